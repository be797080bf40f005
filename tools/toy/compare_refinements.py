#!/usr/bin/env python
"""Compare refinements of the single pass, the sliding-window teacher and a student on the toy data set.

Scores are for the evaluation images ("val"), and for the tuning images ("tune"), on which a refinement is chosen.
Finished rows are stored in the output folder, so that the comparison can be interrupted and resumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.checkpoint.segmentor import build_segmentor
from spar_d2.comparison.methods import Method, measure
from spar_d2.engine.setup import load_config, prepare
from spar_d2.model_zoo import get_config_file
from spar_d2.modeling.refinement import parse_refine
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import write_json, write_text
from spar_d2.utils.tables import format_table
from spar_d2.visualization.panels import draw_panels

TUNE, VAL = "spar_scenes_tune", "spar_scenes_val"
SCORES = ("mIoU", "boundary IoU")
SHOWN_SCENES = (4, 17)
# Part of a scene that is drawn enlarged, in fractions of height and width.
CROP = (slice(0.25, 0.75), slice(0.25, 0.75))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default=get_config_file("toy/distill.yaml"))
    add("--student", type=Path, required=True, metavar="FILE", help="student of spar-d2 toy")
    refine = ["", "lposs", "lposs+", "lposs,lposs+"]
    add(
        "--refine",
        nargs="+",
        default=refine,
        metavar="STEPS",
        help="values of MODEL.SPAR.REFINE (default: %(default)s)",
    )
    add("--limit", type=int, metavar="N", help="evaluate only the first N images")
    add("--output", type=Path, default=Path("output/compare_refinements"), help="(default: %(default)s)")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override")
    return parser.parse_args()


def methods(student: Path, refine: list[str]) -> list[Method]:
    """Return every inference mode with every refinement."""
    modes = [
        Method("pre-trained, single pass"),
        Method("sliding-window teacher", ["MODEL.SPAR.INFERENCE", "sliding_window"]),
        Method("SPAR student", weights=str(student)),
    ]
    steps = ["MODEL.SPAR.REFINE"]
    return [
        Method(f"{mode.name} + {value}" if value else mode.name, [*mode.overrides, *steps, value], mode.weights)
        for mode in modes
        for value in refine
    ]


def evaluate(cfg: CfgNode, method: Method, record: Path, limit: int | None) -> dict[str, float]:
    """Evaluate a method, or read the result if it is finished."""
    if not record.is_file():
        results = {name: measure(cfg, name, method, limit=limit, boundary_iou=True) for name in (TUNE, VAL)}
        scores = {f"{key} ({name})": value for name in results for key, value in summary(results[name].scores).items()}
        write_json({**scores, "seconds": results[VAL].seconds_per_image}, record)
    return json.loads(record.read_text())


def summary(scores: dict[str, float]) -> dict[str, float]:
    """Return the means over all classes of the ground truth."""
    borders = [value for name, value in scores.items() if name.startswith("BoundaryIoU-")]
    return dict(zip(SCORES, (scores["mIoU"], float(np.nanmean(borders)))))


@torch.no_grad()
def draw(cfg: CfgNode, shown: list[Method], path: Path) -> None:
    """Draw parts of scenes and their labels, enlarged, to show the borders of objects."""
    metadata = MetadataCatalog.get(VAL)
    colors = np.asarray(metadata.stuff_colors, dtype=np.uint8)
    models = [build_segmentor(cfg, method.weights, method.overrides) for method in shown]
    rows = []
    for index in SHOWN_SCENES:
        record = DatasetCatalog.get(VAL)[index]
        image = detection_utils.read_image(record["file_name"], "RGB")
        inputs = [{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}]
        labels = [detection_utils.read_image(record["sem_seg_file_name"])]
        labels += [model(inputs)[0]["sem_seg_labels"].cpu().numpy() for model in models]
        part = tuple(slice(int(c.start * n), int(c.stop * n)) for c, n in zip(CROP, image.shape))
        rows.append([image[part], *(colors[predicted][part] for predicted in labels)])
    titles = ["image", "ground truth", *(method.name.replace(" + ", "\n+ ") for method in shown)]
    draw_panels(rows, titles, path, dict(zip(metadata.stuff_classes, metadata.stuff_colors)))


def main() -> None:
    args = parse_args()
    with readable_errors():
        for value in args.refine:
            parse_refine(value)
        cfg = load_config(args.config_file, [*args.opts, "OUTPUT_DIR", str(args.output)])
        prepare(cfg, argparse.Namespace(config_file=args.config_file, eval_only=True), quiet=True)
        compared, rows = methods(args.student, args.refine), []
        for method in compared:
            result = evaluate(cfg, method, args.output / f"{method.name.replace(',', '')}.json", args.limit)
            scores = [f"{result[f'{key} ({name})']:.1f}" for key in SCORES for name in (TUNE, VAL)]
            rows.append([method.name, *scores, f"{result['seconds']:.3f}"])
        head = [f"{name} ({part})" for name in SCORES for part in ("tune", "val")]
        text = format_table(["method", *head, "seconds per image"], rows)
        write_text(text + "\n", args.output / "table.md")
        draw(cfg, compared[-len(args.refine) :], args.output / "borders.png")
    print(f"\n{text}\n\nTable and picture are in {args.output}.")


if __name__ == "__main__":
    main()
