"""Calls to measure: forwards without gradients, over an image that is the same in every run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

Forward = Callable[[torch.Tensor], torch.Tensor]


def random_image(height: int, width: int, device: torch.device) -> torch.Tensor:
    """(1, 3, height, width) float32 of fixed random numbers."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(1, 3, height, width, generator=generator, device=device)


def without_gradient(forward: Forward, x: torch.Tensor, dtype: torch.dtype | None = None) -> Callable[[], torch.Tensor]:
    """A call of ``forward`` with ``x``, under ``torch.autocast`` where a type is given."""

    def run() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, dtype) if dtype else contextlib.nullcontext():
            return forward(x)

    return run


def result_if_it_fits(call: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What the call gives; None where there is not enough memory for it."""
    try:
        return call()
    except RuntimeError as error:
        # PyTorch has no error of its own for CPUs: "DefaultCPUAllocator: can't allocate memory".
        if "memory" not in str(error):
            raise
        return None
