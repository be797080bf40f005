"""Functions to benchmark: forward passes without gradients on a fixed image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.measure import median_seconds, peak_bytes

Forward = Callable[[torch.Tensor], torch.Tensor]


def random_image(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return a random image (1, 3, height, width) float32 with a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(1, 3, height, width, generator=generator, device=device)


def without_gradient(forward: Forward, x: torch.Tensor, dtype: torch.dtype | None = None) -> Callable[[], torch.Tensor]:
    """Return a function that calls ``forward(x)``, under ``torch.autocast`` if a dtype is given."""

    def run() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, dtype) if dtype else contextlib.nullcontext():
            return forward(x)

    return run


class Pair(NamedTuple):
    """Results, median seconds and peak bytes of our function and of another one; None where the other does not fit."""

    ours: torch.Tensor
    other: torch.Tensor | None
    seconds: float
    peak: int | None
    other_seconds: float | None
    other_peak: int | None


def measure_pair(
    ours: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor], fits: bool, repeats: int, device: torch.device
) -> Pair:
    """Call and measure two functions.

    Args:
        ours, other: functions to compare.
        fits: whether the other function is expected to fit into memory; otherwise, it is not called.
        repeats: number of calls for the median.
        device: device to measure on.
    """
    expected = result_if_it_fits(other) if fits else None
    found = ours()
    calls = [ours] if expected is None else [ours, other]
    seconds = median_seconds(calls, repeats, device)
    peaks = [peak_bytes(call, device) for call in calls]
    others = (None, None) if expected is None else (seconds[1], peaks[1])
    return Pair(found, expected, seconds[0], peaks[0], *others)


def result_if_it_fits(call: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Return the result of a call, or None if it runs out of memory."""
    try:
        return call()
    except RuntimeError as error:
        # PyTorch has no exception class for CPU memory: "DefaultCPUAllocator: can't allocate memory".
        if "memory" not in str(error):
            raise
        return None
