"""Conjugate gradients for several right-hand sides at once, each with its own step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

# The reference stops early: its result after at most 10 steps is part of the method, not the exact solution.
STEPS = 10
TOLERANCE = 1e-6
# Number of values that are updated at once: on a CPU, a few such tensors fit the cache.
_VALUES = {"cpu": 1 << 19, "other": 1 << 23}


def chunks(rows: int, length: int, device: torch.device) -> Iterator[slice]:
    """Split 0..length - 1 into ranges, so that ``rows`` x range is a good size of a tensor to work on."""
    step = max(1, _VALUES.get(device.type, _VALUES["other"]) // max(1, rows))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def solve(operator: Callable[[torch.Tensor, torch.Tensor], None], targets: torch.Tensor) -> torch.Tensor:
    """Run at most 10 steps of conjugate gradients for ``A z = y`` from ``z = 0``, for every row of ``targets``.

    A row stops after the step in which its residual is at most 1e-6 of its target; a row of zeros stays zero. Rows do
    not influence each other, so results do not depend on the rows that are solved together, except for rounding. On a
    GPU, the host does not wait: all 10 steps run, and rows that have stopped do not change.

    Args:
        operator: ``operator(p, q)`` writes ``A p`` to ``q``, both of the shape and strides of ``targets``. ``A`` is
            symmetric and positive definite.
        targets: (C, N) float32 values ``y``; overwritten.

    Returns:
        (C, N) float32 values ``z``, with the strides of ``targets``.
    """
    # Powers of 2 change no digit, and keep squares of very large and very small targets within the range of float32.
    exponent = torch.linalg.vector_norm(targets, math.inf, dim=1, keepdim=True).frexp().exponent.clamp_(-126, 126)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=targets.dtype), exponent)
    residual, (rows, length) = targets.div_(scale), targets.shape
    parts = list(chunks(rows, length, targets.device))
    solution, direction, image = torch.zeros_like(targets), targets.clone(), torch.empty_like(targets)
    squares = _dot(residual, residual, parts)
    limit = TOLERANCE**2 * squares
    active = squares > 0
    for step in range(STEPS):
        # A CPU can look without waiting.
        if targets.device.type == "cpu" and not active.any():
            break
        operator(direction, image)
        # Stopped rows take steps of 0. Their quotients may be 0 / 0.
        size = (squares / _dot(direction, image, parts)).where(active, 0).float()[:, None]
        new = torch.zeros_like(squares)
        for part in parts:
            solution[:, part].addcmul_(size, direction[:, part])
            rest = residual[:, part].addcmul_(size, image[:, part], value=-1)
            new += (rest * rest).sum(1).double()
        if step < STEPS - 1:
            factor = (new / squares).where(active, 0).float()[:, None]
            active, squares = active & (new > limit), new
            for part in parts:
                direction[:, part].mul_(factor).add_(residual[:, part])
    return solution.mul_(scale)


def _dot(left: torch.Tensor, right: torch.Tensor, parts: list[slice]) -> torch.Tensor:
    """Compute the inner product (C,) float64 of each row of two tensors (C, N)."""
    total = left.new_zeros(len(left), dtype=torch.float64)
    for part in parts:
        total += (left[:, part] * right[:, part]).sum(1).double()
    return total
