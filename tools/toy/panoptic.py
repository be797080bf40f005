#!/usr/bin/env python
"""Fine-tune PanopticFPN on the toy data set with three encoders, compare them, and draw their predictions."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, detection_utils
from torch import nn

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.data.mappers import read_segments
from spar_d2.engine.setup import clean_start, load_config, prepare
from spar_d2.engine.trainer import Trainer
from spar_d2.model_zoo import get_config_file
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import as_json, write_text
from spar_d2.utils.tables import format_table
from spar_d2.visualization import draw_panels

STUDENT = Path("output/demo/student.safetensors")
SHOWN_SCENES = (4, 1, 10)
COLUMNS = ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config-file", default=get_config_file("toy/panoptic.yaml"), help="training config")
    parser.add_argument("--student", type=Path, default=STUDENT, help="student weights from tools/run_demo.py")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the trainings")
    parser.add_argument("--output", type=Path, default=Path("output/demo_panoptic"), help="output folder")
    parser.add_argument("--resume", action="store_true", help="resume from existing checkpoints")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.time()
    with readable_errors():
        base = load_config(args.config_file, args.opts)
        if not args.student.is_file():
            raise FileNotFoundError(
                f"--student: {args.student} does not exist; tools/run_demo.py (make demo) creates it"
            )
        weights = {
            "untrained encoder": "",
            "pre-trained": base.MODEL.SPAR.PRETRAINED,
            "SPAR student": str(args.student),
        }
        scores, models = {}, {}
        for name, path in weights.items():
            folder = args.output / name.lower().replace(" ", "_")
            overrides = ["MODEL.SPAR.PRETRAINED", path, "OUTPUT_DIR", str(folder), "SEED", args.seed]
            cfg = load_config(args.config_file, [*args.opts, *overrides])
            scores[name], models[name] = fine_tune(cfg, args, name)
        table = markdown(scores)
        for name, content in (("table.md", table + "\n"), ("scores.json", as_json(scores, indent=1))):
            write_text(content, args.output / name)
        draw(base.DATASETS.TEST[0], models, args.output / "panoptic.png")
    print(f"\n{table}\n\nThe table and a figure are in {args.output}; total time {time.time() - started:.0f} s.")


def fine_tune(cfg: CfgNode, args: argparse.Namespace, name: str) -> tuple[dict[str, float], nn.Module]:
    """Train with a config; returns the scores and the model."""
    with clean_start(cfg.OUTPUT_DIR):
        prepare(cfg, argparse.Namespace(config_file=args.config_file, eval_only=False), quiet=True)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    print(f"{name}: {cfg.SOLVER.MAX_ITER} steps (log: {cfg.OUTPUT_DIR}/log.txt) ...")
    trainer.train()
    if trainer.iter < trainer.max_iter:
        raise SystemExit("stopped; run the same command with --resume to continue")
    return trainer.scores["panoptic_seg"], trainer.model.eval()


def markdown(scores: dict[str, dict[str, float]]) -> str:
    """Format the scores as a table with one row per encoder."""
    rows = [[name, *(f"{values[column]:.1f}" for column in COLUMNS)] for name, values in scores.items()]
    return format_table(["encoder", *COLUMNS], rows)


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
