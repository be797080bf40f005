"""Resampling of learned position tables to any grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Weights = tuple[torch.Tensor, torch.Tensor]


def resample_positions(
    table: torch.Tensor,
    native: tuple[int, int],
    grid: tuple[int, int],
    margin: float = 0.0,
    raster_if_same_count: bool = False,
    weights: Callable[[], Weights] | None = None,
) -> torch.Tensor:
    """Bring a table of position embeddings to another grid, bicubically and without antialiasing.

    Equal to ``torch.nn.functional.interpolate`` up to rounding, but in two matrix products: on a GPU that function goes
    through all channels of a cell one after the other.

    Args:
        table: (native_h * native_w, C), in raster order.
        native: (native_h, native_w), the grid that the table was learned on.
        grid: (h, w), the grid wanted.
        margin: cells by which the grid is taken to be larger than it is when sampling positions are computed.
        raster_if_same_count: return the table unchanged also where only the number of cells is equal.
        weights: gives :func:`sampling_weights` of the same arguments where they are kept; default: computed.

    Returns:
        (h * w, C), in raster order; the table itself at the native grid.
    """
    same_count = grid[0] * grid[1] == native[0] * native[1]
    if tuple(grid) == tuple(native) or (raster_if_same_count and same_count):
        return table
    # As in the library's interpolation, sums are in float32 whatever the surroundings compute in.
    with torch.autocast(table.device.type, enabled=False):
        rows, columns = weights() if weights else sampling_weights(native, grid, margin, table.device)
        image = table.float().reshape(*native, -1)
        resampled = torch.einsum("wj,hjc->hwc", columns, torch.einsum("hi,ijc->hjc", rows, image))
    return resampled.reshape(grid[0] * grid[1], -1).to(table.dtype)


def sampling_weights(native: tuple[int, int], grid: tuple[int, int], margin: float, device: torch.device) -> Weights:
    """What each sample takes from each cell, (h, native_h) for rows and (w, native_w) for columns, float32.

    As the library's own interpolation says; arguments as for :func:`resample_positions`.
    """
    rows, columns = (_along_side(size, own, margin, device) for size, own in zip(grid, native))
    return rows, columns


def _along_side(size: int, native: int, margin: float, device: torch.device) -> torch.Tensor:
    one_hot = torch.eye(native, device=device).reshape(1, native, native, 1)
    wanted: dict[str, Any] = {"scale_factor": ((size + margin) / native, 1.0)} if margin else {"size": (size, 1)}
    return F.interpolate(one_hot, mode="bicubic", align_corners=False, **wanted)[0, :, :, 0].T
