"""Speed of panoptic evaluation, compared with a plain implementation with PNG files."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from benchmarks.tables import Table
from spar_d2.evaluation import PanopticEvaluator
from spar_d2.evaluation.panoptic.coco_png import write_ids
from spar_d2.utils.io import write_json

TABLE = Table(
    {
        "size": lambda m: f"{m.size[1]}x{m.size[0]}",
        "segments": lambda m: str(m.segments),
        "ours s/1000 images": lambda m: f"{1e3 * m.ours:.2f}",
        "through PNGs s/1000 images": lambda m: f"{1e3 * m.plain:.1f}",
        "ratio": lambda m: f"{m.plain / m.ours:.0f}x",
        "largest difference": lambda m: f"{m.difference:.0e}",
    },
    left=0,
)
# Numbers of segments as in COCO images: few, typical, many.
CASES = ((480, 640, 8), (480, 640, 20), (480, 640, 60))
_CATEGORIES = {number: {"id": number, "name": str(number), "isthing": int(number <= 80)} for number in range(1, 134)}


@dataclass(frozen=True)
class PanopticEvaluation:
    """Measurement for one kind of image.

    Attributes:
        size, segments: (H, W) of the images and number of their segments.
        ours, plain: seconds per image, including reading the ground truth.
        difference: largest difference between the scores of both implementations, in percent.
    """

    size: tuple[int, int]
    segments: int
    ours: float
    plain: float
    difference: float


@dataclass(frozen=True)
class _Picture:
    """A prediction, and the ground truth's file and segments."""

    record: dict
    ids: np.ndarray
    found: list[dict]
    truth: Path
    segments: list[dict]


def measure_panoptic(folder: Path, images: int) -> Iterator[PanopticEvaluation]:
    """Evaluate the same synthetic predictions with our evaluator and with the plain implementation.

    Args:
        folder: empty folder for ground truth and predictions.
        images: number of images of each kind; mean times are reported.
    """
    for height, width, segments in CASES:
        name = f"spar_panoptic_speed_{segments}"
        root = folder / name
        pictures = [_draw(root, (height, width), segments, index) for index in range(images)]
        annotations = [
            {"image_id": index, "file_name": picture.truth.name, "segments_info": picture.segments}
            for index, picture in enumerate(pictures)
        ]
        write_json({"categories": list(_CATEGORIES.values()), "annotations": annotations}, folder / f"{name}.json")
        things, stuff = ({n: n for n, c in _CATEGORIES.items() if c["isthing"] == thing} for thing in (1, 0))
        MetadataCatalog.get(name).set(
            panoptic_json=str(folder / f"{name}.json"),
            panoptic_root=str(root),
            thing_dataset_id_to_contiguous_id=things,
            stuff_dataset_id_to_contiguous_id=stuff,
        )
        try:
            ours, scores = _evaluate(name, pictures)
        finally:
            MetadataCatalog.remove(name)
        plain, plain_scores = _through_files(folder, pictures)
        difference = max(abs(value - plain_scores.get(key, 0)) for key, value in scores.items() if key[3:].isdigit())
        yield PanopticEvaluation((height, width), segments, ours / images, plain / images, difference)


def _evaluate(name: str, pictures: list[_Picture]) -> tuple[float, dict[str, float]]:
    evaluator = PanopticEvaluator(name, distributed=False)
    outputs = [{"panoptic_seg": (torch.from_numpy(picture.ids), picture.found)} for picture in pictures]
    # Warm-up, which reads the JSON file.
    evaluator.process([pictures[0].record], outputs[:1])
    evaluator.reset()
    started = time.perf_counter()
    for picture, output in zip(pictures, outputs):
        evaluator.process([picture.record], [output])
    seconds = time.perf_counter() - started
    return seconds, evaluator.evaluate()["panoptic_seg"]


def _through_files(folder: Path, pictures: list[_Picture]) -> tuple[float, dict[str, float]]:
    """Evaluate with dictionaries and PNG files; scores have the names of our evaluator."""
    file = folder / "prediction.png"
    totals: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
    started = time.perf_counter()
    for picture in pictures:
        colors = np.stack([picture.ids // 256**channel % 256 for channel in range(3)], axis=2)
        Image.fromarray(colors.astype(np.uint8)).save(file)
        _count(_read(file), picture.found, _read(picture.truth), picture.segments, totals)
    seconds = time.perf_counter() - started
    scores = {number: 100 * iou / (tp + (fp + fn) / 2) for number, (iou, tp, fp, fn) in totals.items()}
    return seconds, {f"PQ-{number}": score for number, score in scores.items()}


def _read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        colors = np.asarray(image).astype(np.int64)
    return colors[..., 0] + 256 * colors[..., 1] + 256**2 * colors[..., 2]


def _count(
    prediction: np.ndarray, found: list[dict], truth: np.ndarray, segments: list[dict], totals: dict[int, np.ndarray]
) -> None:
    keys, pixels = np.unique(truth * 256**3 + prediction, return_counts=True)
    shared = {divmod(key, 256**3): count for key, count in zip(keys.tolist(), pixels.tolist())}
    area: dict[int, int] = defaultdict(int)
    for (_, guess), count in shared.items():
        area[guess] += count
    category = {segment["id"]: segment["category_id"] for segment in found}
    crowds = {segment["category_id"]: segment["id"] for segment in segments if segment["iscrowd"]}
    done = set()
    for segment in segments:
        paired = False
        for guess in () if segment["iscrowd"] else category:
            both = shared.get((segment["id"], guess), 0)
            if both and category[guess] == segment["category_id"]:
                iou = both / (area[guess] + segment["area"] - both - shared.get((0, guess), 0))
                if iou > 0.5:
                    totals[category[guess]] += (iou, 1, 0, 0)
                    done.add(guess)
                    paired = True
        if not paired and not segment["iscrowd"]:
            totals[segment["category_id"]][3] += 1
    for guess in set(category) - done:
        outside = shared.get((0, guess), 0) + shared.get((crowds.get(category[guess]), guess), 0)
        if outside / area[guess] <= 0.5:
            totals[category[guess]][2] += 1


def _draw(root: Path, size: tuple[int, int], count: int, seed: int) -> _Picture:
    rng = np.random.default_rng([count, seed])
    centers = rng.random((count, 2)) * size
    true = _regions(rng, centers, size)
    guess = _regions(rng, centers + rng.normal(0, 6, centers.shape), size)
    categories = rng.integers(1, 134, count)
    guessed = np.where(rng.random(count) < 0.8, categories, rng.integers(1, 134, count))
    # Some regions are void, and some true segments are crowds.
    ids = np.where(rng.random(count) < 0.1, 0, rng.choice(2**24 - 1, count, replace=False) + 1)
    crowd = rng.random(count) < 0.05
    areas = np.bincount(true.ravel(), minlength=count)
    segments = [
        {"id": int(ids[n]), "category_id": int(categories[n]), "iscrowd": int(crowd[n]), "area": int(areas[n])}
        for n in range(count)
        if ids[n] and areas[n]
    ]
    numbers = np.where(rng.random(count) < 0.1, 0, np.arange(1, count + 1)).astype(np.int32)
    found = [
        {"id": int(numbers[n]), "category_id": int(guessed[n]), "isthing": bool(guessed[n] <= 80)}
        for n in np.unique(guess)
        if numbers[n]
    ]
    file = root / f"{seed}.png"
    write_ids(ids[true], file)
    return _Picture({"image_id": seed}, numbers[guess], found, file, segments)


def _regions(rng: np.random.Generator, centers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the nearest center of each pixel (H, W), with edges as irregular as those in real images."""
    height, width = size
    coordinates = np.mgrid[:height, :width].astype(np.float32)
    for axis_coordinates in coordinates:
        for cell, spread in ((32, 14), (4, 3)):
            noise = rng.normal(0, spread, (height // cell, width // cell)).astype(np.float32)
            axis_coordinates += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.argmin([((coordinates - center[:, None, None]) ** 2).sum(axis=0) for center in centers], axis=0)
