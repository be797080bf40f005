#!/usr/bin/env python
"""Test panoptic models of the toy data set on images of other sizes than those of their training.

"larger scenes" have more objects, not bigger ones; "enlarged scenes" are images of the training's size, enlarged. A
model of any resolution gets them as they are, also with queries from more centers in larger images, which needs no
training. A model with a fixed grid gets them resized to the training's size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from panoptic import trained
from torch import nn
from tqdm import tqdm

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.engine.setup import load_config
from spar_d2.evaluation.panoptic.quality import panoptic_quality
from spar_d2.evaluation.panoptic.scores import PanopticCounts
from spar_d2.modeling.mask_transformer.centers import CenterQueries
from spar_d2.toy.scenes import GROUNDS, SCENE_CLASSES, draw_scene, large_scene
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import write_text
from spar_d2.utils.tables import format_table

# Seed of the scenes, and the properties of those of the training: sizes, and numbers of objects and of grounds.
SEED, SIZES, OBJECTS, REGIONS, RADIUS = 303, ((256, 256), (192, 320)), (13, 20), (2, 5), (9, 44)
WAYS = ("any size", "any size, more queries", "fixed grid")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="FOLDER", help="OUTPUT_DIR of a training: config.yaml, model_final.pth")
    add("--factors", nargs="+", type=float, default=[0.5, 1.0, 2.0, 3.0], metavar="K", help="(default: %(default)s)")
    add("--scenes", type=int, default=20, metavar="N", help="number of images of each size (default: %(default)s)")
    add("--output", type=Path, default=Path("output/panoptic_sizes"), help="output folder (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = []
    with readable_errors():
        if args.scenes < 1:
            raise ValueError(f"--scenes must be at least 1, got {args.scenes}")
        if not all(0 < factor <= 100 for factor in args.factors):
            raise ValueError(f"--factors must be above 0 and at most 100, got {args.factors}")
        for run in args.runs:
            for name in ("config.yaml", "model_final.pth"):
                if not (run / name).is_file():
                    raise FileNotFoundError(f"FOLDER: {run} has no {name}; name the OUTPUT_DIR of a finished training")
            model = trained(load_config(str(run / "config.yaml"), ["OUTPUT_DIR", str(run)]))
            for kind in ("larger scenes", "enlarged scenes"):
                for way in WAYS if centers_of(model) else (WAYS[0], WAYS[2]):
                    scores = [quality(model, kind, factor, way, args.scenes) for factor in args.factors]
                    rows.append([run.name, kind, way, *(f"{score:.1f}" for score in scores)])
                    print(*rows[-1], sep=", ", flush=True)
        table = format_table(["model", "images", "input", *(f"{factor:g}x" for factor in args.factors)], rows)
        write_text(table + "\n", args.output / "table.md")
    print(f"\n{table}\n\nThe table (PQ) is in {args.output}.")


def example(kind: str, factor: float, index: int) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Return an image (H, W, 3) uint8, its segments (h, w), and the class of each segment."""
    height, width = SIZES[index % 2]
    size = round(factor * height), round(factor * width)
    if kind == "enlarged scenes":
        scene = large_scene(SEED, index)
        return resized(scene.image, size), *scene.segments()
    objects = (min(255, max(1, round(count * factor**2))) for count in OBJECTS)
    regions = (max(1, round(count * factor)) for count in REGIONS)
    scene = draw_scene(np.random.default_rng([SEED, index]), *size, tuple(objects), RADIUS, tuple(regions))
    return scene.image, *scene.segments()


@torch.no_grad()
def quality(model: nn.Module, kind: str, factor: float, way: str, count: int) -> float:
    """Compute the PQ on images of a size."""
    centers = centers_of(model)
    if centers is not None:
        centers.test_count = round(centers.count * max(1.0, factor**2 if way == WAYS[1] else 1.0))
    counts = PanopticCounts.zeros(range(len(SCENE_CLASSES)))
    for index in tqdm(range(count), desc=f"{kind}, {factor:g}x", leave=False, disable=None):
        image, truth, classes = example(kind, factor, index)
        if way == WAYS[2]:
            image = resized(image, SIZES[index % 2])
        pixels = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
        ids, segments = model([{"image": pixels, "height": truth.shape[0], "width": truth.shape[1]}])[0]["panoptic_seg"]
        found = {
            segment["id"]: segment["category_id"] + len(GROUNDS) if segment["isthing"] else segment["category_id"] - 1
            for segment in segments
        }
        counts += panoptic_quality(ids.numpy(), found, truth, classes.items(), counts.categories)
    return 100 * counts.scores(range(len(GROUNDS), len(SCENE_CLASSES)))["All"]["pq"]


def centers_of(model: nn.Module) -> CenterQueries | None:
    """Return the part that makes queries of centers, if a model has it."""
    return next((part for part in model.modules() if isinstance(part, CenterQueries)), None)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, 3) to a height and width."""
    smaller = size[0] < image.shape[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


if __name__ == "__main__":
    main()
