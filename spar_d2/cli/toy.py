"""Toy experiment: distill a student on a synthetic data set, compare it with its teacher, and visualize both."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils

import spar_d2  # noqa: F401  registers
from spar_d2.checkpoint.segmentor import build_segmentor
from spar_d2.comparison.methods import Method, Result, markdown_table, measure
from spar_d2.encoders import describe_encoder
from spar_d2.engine.setup import clean_start, load_config, prepare
from spar_d2.engine.trainer import STUDENT_FILE, Trainer
from spar_d2.model_zoo import get_config_file
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import write_text
from spar_d2.visualization import draw_panels, shared_pca_colors

SHOWN_SCENES = (4, 1, 10)
VAL = "spar_scenes_val"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config-file", default=get_config_file("toy/distill.yaml"), help="config of the training")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the training")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="output folder")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.time()
    with readable_errors():
        cfg = load_config(args.config_file, ["OUTPUT_DIR", str(args.output), "SEED", args.seed, *args.opts])
        student = args.output / STUDENT_FILE
        earlier = version(student)
        with clean_start(cfg.OUTPUT_DIR):
            prepare(cfg, argparse.Namespace(config_file=args.config_file, eval_only=False), quiet=True)
            trainer = Trainer(cfg)
        print(f"Distilling {cfg.SOLVER.MAX_ITER} steps (log: {args.output}/log.txt) ...")
        trainer.train()
        if version(student) == earlier:
            raise SystemExit("stopped before the end of training; no student was written")
        results = [measure(cfg, VAL, method) for method in methods(cfg, student)]
        table = markdown_table(results, baseline=results[2])
        write_text(table + "\n", args.output / "table.md")
        draw(cfg, [results[0], results[2], results[3]], args.output / "pictures")
    print(f"\n{table}\n")
    print(f"{len(DatasetCatalog.get(VAL))} images, {torch.get_num_threads()} threads, {cfg.MODEL.DEVICE};", end=" ")
    print(f"visualizations, table and student are in {args.output}; total time {time.time() - started:.0f} s.")


def version(path: Path) -> tuple[int, int] | None:
    """Return the file signature (inode and modification time), or None if the file does not exist."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def methods(cfg: CfgNode, student: Path) -> list[Method]:
    """Return the inference modes: pre-trained single pass, disjoint tiles, teacher, and student."""
    sliding = ["MODEL.SPAR.INFERENCE", "sliding_window", "SPAR.TEACHER.STRIDE"]
    stride = cfg.SPAR.TEACHER.STRIDE
    window = cfg.SPAR.TEACHER.WINDOW or describe_encoder(cfg.MODEL.SPAR.ENCODER).native_size
    return [
        Method("pre-trained, single pass"),
        Method("pre-trained, disjoint tiles", [*sliding, window]),
        Method(f"sliding-window teacher, stride {stride}", [*sliding, stride]),
        Method("SPAR student, single pass", weights=str(student)),
    ]


@torch.no_grad()
def draw(cfg: CfgNode, shown: list[Result], folder: Path) -> None:
    """Visualize predictions and features of a few images."""
    metadata = MetadataCatalog.get(VAL)
    colors = np.asarray(metadata.stuff_colors, dtype=np.uint8)
    records = [DatasetCatalog.get(VAL)[index] for index in SHOWN_SCENES]
    images = [detection_utils.read_image(record["file_name"], "RGB") for record in records]
    truths = [detection_utils.read_image(record["sem_seg_file_name"]) for record in records]
    labels, features = [], []
    for result in shown:
        model = build_segmentor(cfg, result.method.weights, result.method.overrides)
        inputs = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]
        labels.append([model([{"image": x}])[0]["sem_seg_labels"].cpu().numpy() for x in inputs])
        features.append([model.encode(x) for x in inputs])
    names = ["single pass", "teacher", "SPAR student"]
    legend = dict(zip(metadata.stuff_classes, metadata.stuff_colors))
    rows = [
        [image, colors[truth], *(colors[predicted[i]] for predicted in labels)]
        for i, (image, truth) in enumerate(zip(images, truths))
    ]
    titles = [
        f"{name}\n{result.scores['mIoU']:.1f} mIoU, {result.seconds_per_image:.2f} s"
        for name, result in zip(names, shown)
    ]
    draw_panels(rows, ["image", "ground truth", *titles], folder / "predictions.png", legend)
    rows = [
        [image, *(part.numpy() for part in shared_pca_colors([maps[i] for maps in features]))]
        for i, image in enumerate(images)
    ]
    draw_panels(rows, ["image", *(f"{name}: features" for name in names)], folder / "features.png")
