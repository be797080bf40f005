"""Labels on the GPU, compared with a CPU, and labels of the fused kernel, compared with row chunks."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.checks import FACTS, Fact
from benchmarks.gpu_check.labeled_image import NEAR, LabeledImage, random_image
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.waits import check_waits
from benchmarks.tables import Table
from spar_d2.modeling import best_query

_PROBABILITY = 0.1
_FUSED, _BANDS, _TF32 = "device and CPU", "fused and in bands, on the device", "with TF32 and without, on the device"


@dataclass(frozen=True)
class Agreement:
    """Comparison of the labels of a few images, computed in two ways.

    Attributes:
        compared: the two ways.
        thresholds: which thresholds are used.
        words: number of text embeddings.
        views: number of augmented copies of each image, whose scores are averaged.
        pixels: total number of pixels.
        different: number of pixels with different labels.
        unequal: number of those whose two labels do not have equal scores up to rounding.
    """

    compared: str
    thresholds: str
    words: int
    views: int
    pixels: int
    different: int
    unequal: int

    @property
    def passed(self) -> bool:
        return not self.unequal


TABLE = Table(
    columns={
        "compared": lambda a: a.compared,
        "thresholds": lambda a: a.thresholds,
        "words": lambda a: str(a.words),
        "views": lambda a: str(a.views),
        "other labels": lambda a: f"{a.different} of {a.pixels}",
        "not near a tie": lambda a: str(a.unequal),
        "result": lambda a: "passed" if a.passed else "**FAILED**",
    },
    always=(
        f"not near a tie: pixels with other labels whose two labels have scores that differ by more than "
        f"{NEAR}, or, with a threshold, whose probability is not close to it.",
    ),
    sometimes={},
)


@torch.no_grad()
def check_labels(record: Record, settings: Settings) -> None:
    """Label images with random features, with and without thresholds, on the device and on a CPU."""
    image = random_image(settings.words[0], settings.label_sizes[0]).on(settings.device)
    _check_kernel(record, image)
    for area, limit in ((None, 0), (0.01, 1)):
        named = "with" if area else "without"
        labels = functools.partial(image.labels, _PROBABILITY, area)
        check_waits(record, f"labels {named} an area threshold", labels, settings.device, limit)
    for words in settings.words:
        for views, thresholds in ((1, "none"), (1, "probability"), (1, "area"), (2, "probability and area")):
            pairs = [_pairs(settings.device, words, size, views, thresholds) for size in settings.label_sizes]
            for compared in pairs[0]:
                pixels, different, unequal = map(sum, zip(*(found[compared] for found in pairs)))
                record.add("Labels", TABLE, Agreement(compared, thresholds, words, views, pixels, different, unequal))


def _pairs(
    device: torch.device, words: int, size: tuple[int, int], views: int, thresholds: str
) -> dict[str, tuple[int, int, int]]:
    """Return, for each comparison, the numbers of pixels, of different labels, and of those not near a tie."""
    image = random_image(words, size, views)
    probability = _PROBABILITY if "probability" in thresholds else 0.0
    area = _middle_area(image.labels(0.0, None)) if "area" in thresholds else None
    on_device = image.on(device)
    found = on_device.labels(probability, area)
    with kernel_off():
        in_bands = on_device.labels(probability, area)
    pairs = {_FUSED: (image.labels(probability, area), found), _BANDS: (in_bands, found)}
    if thresholds == "none":
        with _tf32():
            pairs[_TF32] = (found, replace(on_device).labels(probability, area))
    return {way: (found.numel(), *image.disagreement(*pair, probability)) for way, pair in pairs.items()}


def _check_kernel(record: Record, image: LabeledImage) -> None:
    """Check that the kernel runs on a GPU: if it cannot run, it is replaced without an error."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda message: warnings.append(message.getMessage())
    best_query.logger.addHandler(handler)
    try:
        with _SeenKernel() as seen:
            image.labels(_PROBABILITY, None)
        if image.text.is_cuda:
            torch.cuda.synchronize(image.text.device)
    finally:
        best_query.logger.removeHandler(handler)
    found = warnings[0] if warnings else "fused kernel" if seen.kernel else "in bands"
    passed = found == ("fused kernel" if image.text.is_cuda else "in bands")
    record.add("Kernel for labels", FACTS, Fact("labels", "by the fused kernel on a GPU, else in bands", found, passed))


class _SeenKernel(TorchDispatchMode):
    """Records whether the fused kernel is called."""

    kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.kernel |= func.name().startswith("spar_d2::best_query")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kernel_off() -> Iterator[None]:
    """Compute labels in row chunks."""
    before = os.environ.get(best_query.SWITCH)
    os.environ[best_query.SWITCH] = "0"
    try:
        yield
    finally:
        del os.environ[best_query.SWITCH]
        if before is not None:
            os.environ[best_query.SWITCH] = before


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _middle_area(labels: torch.Tensor) -> float:
    """Choose a threshold that removes about half of the classes and is far from the area of any class."""
    areas = labels.flatten().bincount()[1:].double()
    found = areas.sort().values
    middle = found[len(found) // 4 : max(2, len(found) * 3 // 4 + 1)]
    if len(middle) < 2:
        return 0.5
    widest = int(middle.diff().argmax())
    return float((middle[widest] + middle[widest + 1]) / 2 / areas.sum())
