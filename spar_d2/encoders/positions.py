"""Resampling of learnt position tables to any grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The authors' code enlarges the requested grid by a tenth of a cell, against rounding down. Because the sampling
# positions use the given factor, this also shifts them slightly; students are trained with it, so it stays.
_GRID_MARGIN = 0.1


def resample_positions(
    table: torch.Tensor, native: tuple[int, int], grid: tuple[int, int], raster_if_same_count: bool = False
) -> torch.Tensor:
    """Bring a table of position embeddings to another grid, bicubically and without antialiasing.

    Args:
        table: (native_h * native_w, C), in raster order.
        native: (native_h, native_w), the grid that the table was learnt on.
        grid: (h, w), the grid wanted.
        raster_if_same_count: return the table unchanged also where only the number of cells is equal, as the
            authors' code does.

    Returns:
        (h * w, C), in raster order; the table itself at the native grid.
    """
    same_count = grid[0] * grid[1] == native[0] * native[1]
    if tuple(grid) == tuple(native) or (raster_if_same_count and same_count):
        return table
    # (N, C) -> (1, C, native_h, native_w); bicubic interpolation has no half-precision kernel on every device.
    image = table.float().reshape(1, *native, -1).permute(0, 3, 1, 2)
    factors = tuple((size + _GRID_MARGIN) / size_native for size, size_native in zip(grid, native))
    resampled = F.interpolate(image, scale_factor=factors, mode="bicubic", align_corners=False)
    return resampled.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(table.dtype)
