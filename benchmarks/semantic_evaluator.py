"""How fast label maps are evaluated, beside Detectron2's own evaluator."""

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

from spar_d2.evaluation import SemanticEvaluator

HEAD = (
    "| size | classes | ours ms | Detectron2 ms | ratio | ours with boundary IoU ms | largest difference |",
    "|---:|---:|---:|---:|---:|---:|---:|",
)
# Like a photo of COCO with ADE20K's classes, and like one of Cityscapes.
CASES = (((480, 640), 150), ((1024, 2048), 19))
_BLOCK = 16


@dataclass(frozen=True)
class Evaluation:
    """Measured for one size.

    Attributes:
        ours, theirs, boundary: seconds for an image; ours without and with boundary IoU, Detectron2's, which always has
            it, and the masks.
        difference: the largest between the scores of the two, in percent, but for the boundary IoU.
    """

    size: tuple[int, int]
    classes: int
    ours: float
    theirs: float
    boundary: float
    difference: float

    def row(self) -> str:
        """A row under ``HEAD``."""
        times = f"{1e3 * self.ours:.1f} | {1e3 * self.theirs:.0f} | {self.theirs / self.ours:.0f}x"
        size = f"{self.size[1]}x{self.size[0]} | {self.classes}"
        return f"| {size} | {times} | {1e3 * self.boundary:.1f} | {self.difference:.0e} |"


def measure_evaluators(folder: Path, images: int, device: torch.device | None = None) -> Iterator[Evaluation]:
    """Evaluate the same random label maps by ours and by Detectron2's, reading the ground truth each time.

    Args:
        folder: an empty one, for the ground truth.
        images: of each size; their median times are taken.
        device: where the label maps are, as those of a model there; the CPU if not given.
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
                # Its own way of reading needs an older numpy.
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
        # Scores whose arg max is free of charge.
        output = {"sem_seg_labels": labels, "sem_seg": _Scores(labels)}
        _wait(labels)
        started = time.perf_counter()
        evaluator.process([record], [output])
        _wait(labels)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _wait(labels: torch.Tensor) -> None:
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
    """(H, W) uint8, regions of one class as large as those of photos."""
    height, width = size
    cells = np.random.default_rng(seed).integers(0, classes, (height // _BLOCK, width // _BLOCK), dtype=np.uint8)
    return cells.repeat(_BLOCK, 0).repeat(_BLOCK, 1)
