#!/usr/bin/env python
"""Fine-tune panoptic models on the toy data set with three encoders, compare them, and draw their predictions.

Each config is trained with each encoder and seed; the table has means and standard deviations. Finished trainings are
kept in the output folder, and others are resumed.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, detection_utils
from torch import nn

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.data.mappers import read_segments
from spar_d2.engine.setup import clean_start, load_config, prepare
from spar_d2.engine.trainer import Trainer
from spar_d2.model_zoo import get_config_file
from spar_d2.utils.content_cache import digest
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import write_json, write_text
from spar_d2.utils.tables import format_table
from spar_d2.visualization import draw_panels

STUDENT = Path("output/demo/student.safetensors")
SHOWN_SCENES = (4, 1, 10)
COLUMNS = ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")
ENCODERS = ("untrained encoder", "pre-trained", "SPAR student")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    configs = [get_config_file("toy/panoptic.yaml")]
    add(
        "--config-file",
        nargs="+",
        default=configs,
        metavar="FILE",
        help="training configs (default: toy/panoptic.yaml)",
    )
    add("--student", type=Path, default=STUDENT, help="student weights from tools/run_demo.py (default: %(default)s)")
    add("--encoders", nargs="+", choices=ENCODERS, default=ENCODERS, help="encoders to compare (default: all)")
    add("--seeds", type=int, default=1, metavar="N", help="number of trainings with different seeds (default: 1)")
    add("--output", type=Path, default=Path("output/demo_panoptic"), help="output folder (default: %(default)s)")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys to override")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.time()
    with readable_errors():
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
        runs = {(config, encoder): [] for config in args.config_file for encoder in args.encoders}
        for seed in range(args.seeds):
            for config, encoder in runs:
                cfg = config_of(args, config, encoder, seed)
                train = functools.partial(fine_tuned_scores, cfg, config)
                runs[config, encoder].append(measured_once(cfg, train))
        names = row_names(args, runs)
        table = markdown(dict(zip(names, runs.values())))
        write_text(table + "\n", args.output / "table.md")
        configs = (config_of(args, *run, 0) for run in runs)
        models = {name: trained(cfg) for name, cfg in zip(names, configs)}
        draw(cfg.DATASETS.TEST[0], models, args.output / "panoptic.png")
    print(f"\n{table}\n\nThe table and a figure are in {args.output}; total time {time.time() - started:.0f} s.")


def row_names(args: argparse.Namespace, runs: Iterable[tuple[str, str]]) -> list[str]:
    """Name the rows by encoder, and by model if there are several configs."""
    models = {config: load_config(config, args.opts).MODEL.META_ARCHITECTURE for config in args.config_file}
    if len(set(models.values())) < len(models):
        models = {config: Path(config).stem for config in models}
    return [encoder if len(models) == 1 else f"{models[config]}, {encoder}" for config, encoder in runs]


def config_of(args: argparse.Namespace, config: str, encoder: str, seed: int) -> CfgNode:
    """Load the config of a training.

    Raises:
        FileNotFoundError: there is no student.
    """
    folder = args.output / Path(config).stem / f"{encoder.lower().replace(' ', '_')}_{seed}"
    overrides: list = ["OUTPUT_DIR", str(folder), "SEED", seed]
    if encoder == ENCODERS[0]:
        overrides += ["MODEL.SPAR.PRETRAINED", ""]
    elif encoder == ENCODERS[2]:
        if not args.student.is_file():
            raise FileNotFoundError(
                f"--student: {args.student} does not exist; tools/run_demo.py (make demo) creates it"
            )
        overrides += ["MODEL.SPAR.PRETRAINED", str(args.student)]
    return load_config(config, [*args.opts, *overrides])


def measured_once(cfg: CfgNode, measure: Callable[[], dict]) -> dict:
    """Return the scores that ``measure`` returned for a config, which are stored in its output folder.

    Raises:
        ValueError: the folder has the scores of another config.
    """
    # A training may change the config.
    result, keys = Path(cfg.OUTPUT_DIR) / "scores.json", digest(cfg.dump())
    if not result.is_file():
        write_json({"scores": measure(), "keys": keys}, result, indent=1)
    content = json.loads(result.read_text())
    if content["keys"] != keys:
        raise ValueError(f"--output: {cfg.OUTPUT_DIR} has a finished training with other keys; choose another folder")
    return content["scores"]


def fine_tune(cfg: CfgNode, config: str, name: str) -> tuple[dict[str, float], nn.Module]:
    """Train with a config, or resume a training; returns the scores and the model."""
    with clean_start(cfg.OUTPUT_DIR):
        prepare(cfg, argparse.Namespace(config_file=config, eval_only=False), quiet=True)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
    print(f"{name}: {cfg.SOLVER.MAX_ITER} steps (log: {cfg.OUTPUT_DIR}/log.txt) ...")
    trainer.train()
    if trainer.iter < trainer.max_iter:
        raise SystemExit("stopped; run the same command again to continue")
    return trainer.scores["panoptic_seg"], trainer.model.eval()


def fine_tuned_scores(cfg: CfgNode, config: str) -> dict[str, float]:
    """Train with a config; returns the scores."""
    return fine_tune(cfg, config, cfg.OUTPUT_DIR)[0]


def trained(cfg: CfgNode) -> nn.Module:
    """Load a trained model."""
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(str(Path(cfg.OUTPUT_DIR) / "model_final.pth"))
    return model.eval()


def markdown(runs: dict[str, list[dict[str, float]]]) -> str:
    """Format the scores as a table with one row per model: means and standard deviations over the seeds."""
    rows = [
        [name, *(spread([scores[column] for scores in several]) for column in COLUMNS)]
        for name, several in runs.items()
    ]
    return format_table(["model", *COLUMNS], rows)


def spread(values: list[float]) -> str:
    """Format the mean and, of several values, the standard deviation."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


@torch.no_grad()
def draw(data_set: str, models: dict[str, nn.Module], path: Path) -> None:
    """Draw some images, their ground truth, and the predictions of each model."""
    metadata = MetadataCatalog.get(data_set)
    rows = []
    for record in (DatasetCatalog.get(data_set)[index] for index in SHOWN_SCENES):
        image = detection_utils.read_image(record["file_name"], "RGB")
        x = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
        inputs = [{"image": x, "height": image.shape[0], "width": image.shape[1]}]
        truth = torch.from_numpy(read_segments(record))
        panoptics = [(truth, record["segments_info"]), *(model(inputs)[0]["panoptic_seg"] for model in models.values())]
        rows.append([image, *(paint(ids.cpu().numpy(), segments, metadata) for ids, segments in panoptics)])
    names, colors = metadata.stuff_classes[1:], metadata.stuff_colors[1:]
    legend = dict(zip([*names, *metadata.thing_classes], [*colors, *metadata.thing_colors]))
    draw_panels(rows, ["image", "ground truth", *models], path, legend)


def paint(ids: np.ndarray, segments: list[dict], metadata: Metadata) -> np.ndarray:
    """Draw segments (H, W) in the colors of their classes, with white outlines of things; returns (H, W, 3) uint8."""
    painted = np.zeros((*ids.shape, 3), dtype=np.uint8)
    for segment in segments:
        inside = ids == segment["id"]
        colors = metadata.thing_colors if segment["isthing"] else metadata.stuff_colors
        painted[inside] = colors[segment["category_id"]]
        if segment["isthing"]:
            painted[inside & ~cv2.erode(inside.astype(np.uint8), np.ones((3, 3))).astype(bool)] = 255
    return painted


if __name__ == "__main__":
    main()
