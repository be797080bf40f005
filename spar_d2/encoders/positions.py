"""Resampling of learned position embeddings to any grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from spar_d2.encoders.symbolic import is_symbolic

Weights = tuple[torch.Tensor, torch.Tensor]


def resample_positions(
    table: torch.Tensor,
    native: tuple[int, int],
    grid: tuple[int, int],
    margin: float = 0.0,
    raster_if_same_count: bool = False,
    weights: Callable[[], Weights] | None = None,
) -> torch.Tensor:
    """Resample position embeddings to another grid, with bicubic interpolation.

    The result equals ``torch.nn.functional.interpolate`` up to rounding, but is computed with two matrix products. On
    GPUs this is faster, because ``interpolate`` processes the channels of a grid cell sequentially.

    Args:
        table: position embeddings (native_h * native_w, C), in row-major order.
        native: pre-training grid (native_h, native_w).
        grid: target grid (h, w).
        margin: number of grid cells added to the target grid when computing sampling positions.
        raster_if_same_count: return the table unchanged if both grids have the same number of cells.
        weights: function that returns cached :func:`sampling_weights` for these arguments; default: compute them,
            without antialiasing.

    Returns:
        (h * w, C), in row-major order. At the pre-training grid, the table itself.
    """
    if not is_symbolic(grid):
        same_count = grid[0] * grid[1] == native[0] * native[1]
        if tuple(grid) == tuple(native) or (raster_if_same_count and same_count):
            return table
    # Always sum in float32, as F.interpolate does.
    with torch.autocast(table.device.type, enabled=False):
        rows, columns = weights() if weights else sampling_weights(native, grid, margin, table.device)
        image = table.float().reshape(*native, -1)
        resampled = torch.einsum("wj,hjc->hwc", columns, torch.einsum("hi,ijc->hjc", rows, image))
    return resampled.reshape(grid[0] * grid[1], -1).to(table.dtype)


def sampling_weights(
    native: tuple[int, int], grid: tuple[int, int], margin: float, device: torch.device, antialias: bool = False
) -> Weights:
    """Return the interpolation weights of rows (h, native_h) and columns (w, native_w), float32.

    The weights are those of ``F.interpolate``. See :func:`resample_positions` for the arguments.

    Args:
        antialias: as in ``F.interpolate``; only without a margin.
    """
    if is_symbolic(grid):
        return _symbolic_weights(native, grid, margin, device, antialias)
    rows, columns = (_along_side(size, side, margin, device, antialias) for size, side in zip(grid, native))
    return rows, columns


def _along_side(size: int, native: int, margin: float, device: torch.device, antialias: bool) -> torch.Tensor:
    # The native side is the height; antialiasing along a width of 1 is not reliable.
    one_hot = torch.eye(native, device=device)[None, None]
    if margin:
        # In tracing, the size is a tensor.
        target: dict[str, Any] = {"scale_factor": ((int(size) + margin) / native, 1.0)}
    else:
        target = {"size": (size, native)}
    return F.interpolate(one_hot, mode="bicubic", align_corners=False, antialias=antialias, **target)[0, 0]


def _symbolic_weights(
    native: tuple[int, int], grid: tuple[int, int], margin: float, device: torch.device, antialias: bool
) -> Weights:
    """Compute :func:`sampling_weights` by arithmetic that ``torch.export`` can record for any grid."""
    sides = [torch.full((), size, dtype=torch.float32, device=device) for size in grid]
    # Without the margin, the weights of the pre-training grid are exactly 0 and 1.
    is_native = (sides[0] == native[0]) & (sides[1] == native[1])
    margins = torch.where(is_native, 0.0, margin)
    rows, columns = (
        _along_symbolic_side(size, cells, cells / (side + margins), antialias)
        for size, side, cells in zip(grid, sides, native)
    )
    return rows, columns


def _along_symbolic_side(size: int, native: int, scale: torch.Tensor, antialias: bool) -> torch.Tensor:
    """Compute the weights (size, native) along a side; ``scale`` is the number of table cells per target cell."""
    cells = torch.arange(native, dtype=torch.float32, device=scale.device)
    steps = torch.arange(size, dtype=torch.float32, device=scale.device)
    # Centers of the target cells, where a cell of the table is one unit wide, (size, 1).
    centers = ((steps + 0.5) * scale)[:, None]
    if antialias:
        weights = _cubic((cells + 0.5 - centers) / scale.clamp(min=1), -0.5)
        return weights / weights.sum(1, keepdim=True)
    first = (centers - 0.5).floor()
    weights = torch.zeros_like(cells)
    for tap in (-1, 0, 1, 2):
        # Cells outside of the table are those at its border.
        is_cell = ((first + tap).clamp(0, native - 1) == cells).float()
        weights = weights + _cubic(centers - 0.5 - (first + tap), -0.75) * is_cell
    return weights


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Cubic convolution kernel (Keys, 1981) with the parameter ``a``."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
