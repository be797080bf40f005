"""Speed of semantic evaluation, compared with Detectron2's evaluator."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator
from PIL import Image

from benchmarks.tables import Table
from spar_d2.evaluation import SemanticEvaluator

TABLE = Table(
    {
        "size": lambda m: f"{m.size[1]}x{m.size[0]}",
        "classes": lambda m: str(m.classes),
        "ours ms": lambda m: f"{1e3 * m.ours:.1f}",
        "Detectron2 ms": lambda m: f"{1e3 * m.theirs:.0f}",
        "ratio": lambda m: f"{m.theirs / m.ours:.0f}x",
        "ours with boundary IoU ms": lambda m: f"{1e3 * m.boundary:.1f}",
        "largest difference": lambda m: f"{m.difference:.0e}",
    },
    left=0,
)
# Similar to COCO images with ADE20K's classes, and to Cityscapes images.
CASES = (((480, 640), 150), ((1024, 2048), 19))
_BLOCK = 16


@dataclass(frozen=True)
class Evaluation:
    """Measurement for one image size.

    Attributes:
        size, classes: (H, W) of the images and number of classes.
        ours, theirs, boundary: seconds per image: ours, Detectron2's (which always includes boundary IoU and masks),
            and ours with boundary IoU.
        difference: largest difference between both evaluators' scores in percent, except boundary IoU.
    """

    size: tuple[int, int]
    classes: int
    ours: float
    theirs: float
    boundary: float
    difference: float


def measure_evaluators(folder: Path, images: int, device: torch.device | None = None) -> Iterator[Evaluation]:
    """Evaluate the same random label maps with both evaluators, including reading the ground truth.

    Args:
        folder: empty folder for the ground truth.
        images: number of images of each size; median times are reported.
        device: device of the label maps, as those of a model; default: CPU.
    """
    for size, classes in CASES:
        name = f"spar_evaluator_speed_{size[0]}x{size[1]}"
        guesses = [_blocks(size, classes, 2 * index) for index in range(images)]
        records = []
        for index in range(images):
            truth = folder / f"{name}_{index}.png"
            Image.fromarray(_blocks(size, classes, 2 * index + 1)).save(truth)
            records.append({"file_name": f"{index}", "sem_seg_file_name": str(truth)})
        DatasetCatalog.register(name, lambda records=records: records)
        MetadataCatalog.get(name).set(stuff_classes=[str(number) for number in range(classes)], ignore_label=255)
        try:
            evaluators = [
                SemanticEvaluator(name, distributed=False),
                # Detectron2's default reader needs an older NumPy.
                SemSegEvaluator(name, distributed=False, sem_seg_loading_fn=_read),
                SemanticEvaluator(name, distributed=False, boundary_iou=True),
            ]
            times = [_time(evaluator, records, guesses, device) for evaluator in evaluators]
            ours, theirs = (evaluator.evaluate()["sem_seg"] for evaluator in evaluators[:2])
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        shared = [key for key in ours if key in theirs and not np.isnan(theirs[key])]
        difference = max(abs(ours[key] - theirs[key]) for key in shared)
        yield Evaluation(size, classes, *times, difference)


def _time(
    evaluator: DatasetEvaluator, records: list[dict], guesses: list[np.ndarray], device: torch.device | None
) -> float:
    evaluator.reset()
    seconds = []
    for record, guess in zip(records, guesses):
        labels = torch.from_numpy(guess).long().to(device or "cpu")
        # Scores with a free argmax.
        output = {"sem_seg_labels": labels, "sem_seg": _Scores(labels)}
        _synchronize(labels)
        started = time.perf_counter()
        evaluator.process([record], [output])
        _synchronize(labels)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _synchronize(labels: torch.Tensor) -> None:
    if labels.is_cuda:
        torch.cuda.synchronize(labels.device)


class _Scores:
    def __init__(self, labels: torch.Tensor) -> None:
        self._labels = labels

    def argmax(self, dim: int) -> torch.Tensor:
        return self._labels


def _read(file: str, dtype: type = int) -> np.ndarray:
    return np.array(Image.open(file), dtype=dtype)


def _blocks(size: tuple[int, int], classes: int, seed: int) -> np.ndarray:
    """Generate labels (H, W) uint8 with regions of realistic size."""
    height, width = size
    cells = np.random.default_rng(seed).integers(0, classes, (height // _BLOCK, width // _BLOCK), dtype=np.uint8)
    return cells.repeat(_BLOCK, 0).repeat(_BLOCK, 1)
