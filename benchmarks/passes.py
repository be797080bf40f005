"""Functions to benchmark: forward passes without gradients on a fixed image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

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


def result_if_it_fits(call: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Return the result of a call, or None if it runs out of memory."""
    try:
        return call()
    except RuntimeError as error:
        # PyTorch has no exception class for CPU memory: "DefaultCPUAllocator: can't allocate memory".
        if "memory" not in str(error):
            raise
        return None
