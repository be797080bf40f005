"""Resampling of learnt position tables to any grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def resample_positions(
    table: torch.Tensor,
    native: tuple[int, int],
    grid: tuple[int, int],
    margin: float = 0.0,
    raster_if_same_count: bool = False,
) -> torch.Tensor:
    """Bring a table of position embeddings to another grid, bicubically and without antialiasing.

    Args:
        table: (native_h * native_w, C), in raster order.
        native: (native_h, native_w), the grid that the table was learnt on.
        grid: (h, w), the grid wanted.
        margin: cells by which the grid is taken to be larger than it is when sampling positions are computed.
        raster_if_same_count: return the table unchanged also where only the number of cells is equal.

    Returns:
        (h * w, C), in raster order; the table itself at the native grid.
    """
    same_count = grid[0] * grid[1] == native[0] * native[1]
    if tuple(grid) == tuple(native) or (raster_if_same_count and same_count):
        return table
    # (N, C) -> (1, C, native_h, native_w); bicubic interpolation has no half-precision kernel on every device.
    image = table.float().reshape(1, *native, -1).permute(0, 3, 1, 2)
    if margin:
        wanted = {"scale_factor": tuple((size + margin) / own for size, own in zip(grid, native))}
    else:
        wanted = {"size": tuple(grid)}
    resampled = F.interpolate(image, mode="bicubic", align_corners=False, **wanted)
    return resampled.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(table.dtype)
