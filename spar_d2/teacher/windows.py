"""The plan of a sliding window: where windows lie, how finely their features are stitched, how often a cell is seen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Positions of the windows along one side: every ``stride``, and one more flush with the end if needed."""
    starts = list(range(0, length - window + 1, stride))
    if starts[-1] != length - window:
        starts.append(length - window)
    return starts


def upsample_factor(patch: int, stride: int) -> int:
    """Smallest factor by which a window's patch grid must be refined for the stride to be a whole number of cells."""
    return next(r for r in range(1, patch + 1) if patch % r == 0 and stride % (patch // r) == 0)


@dataclass(frozen=True)
class WindowPlan:
    """Where the windows of one image lie, and the mosaic of fine cells that their features are added up in.

    Attributes:
        height, width: size of the (padded) image in pixels, at least ``window`` each.
        window: side of a window in pixels, a multiple of ``patch``.
        stride: step between windows in pixels.
        patch: side of a patch in pixels.
    """

    height: int
    width: int
    window: int
    stride: int
    patch: int

    @cached_property
    def factor(self) -> int:
        """How many fine cells a patch has along a side."""
        return upsample_factor(self.patch, self.stride)

    @property
    def cell(self) -> int:
        """Side of a fine cell in pixels."""
        return self.patch // self.factor

    @property
    def window_cells(self) -> int:
        """Fine cells along a window's side."""
        return self.window // self.cell

    @property
    def mosaic_size(self) -> tuple[int, int]:
        """Fine cells of the whole image, (rows, columns)."""
        return self.height // self.cell, self.width // self.cell

    @cached_property
    def origins(self) -> torch.Tensor:
        """(m, 2) int64, top and left of every window in pixels, row by row."""
        rows = torch.tensor(window_starts(self.height, self.window, self.stride))
        columns = torch.tensor(window_starts(self.width, self.window, self.stride))
        return torch.cartesian_prod(rows, columns).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.origins)

    def cells_of(self, windows: torch.Tensor) -> torch.Tensor:
        """(k,) window numbers to (k, window_cells ** 2) numbers of the mosaic cells that they cover, both in raster
        order."""
        rows, columns = (self.origins.to(windows.device)[windows] // self.cell).unbind(1)
        steps = torch.arange(self.window_cells, device=windows.device)
        cells = (rows[:, None] + steps)[:, :, None] * self.mosaic_size[1] + (columns[:, None] + steps)[:, None]
        return cells.flatten(1)

    @cached_property
    def counts(self) -> torch.Tensor:
        """(rows, columns) float32, how many windows of the full plan cover each mosaic cell; at least 1."""
        along_sides = []
        for length, total in zip((self.height, self.width), self.mosaic_size):
            starts = torch.tensor(window_starts(length, self.window, self.stride)) // self.cell
            along_sides.append(_coverage(starts, self.window_cells, total))
        return torch.outer(*along_sides)


def _coverage(starts: torch.Tensor, length: int, total: int) -> torch.Tensor:
    """(total,) float32, how many of the intervals [start, start + length) contain each place."""
    places = torch.arange(total)
    return ((places >= starts[:, None]) & (places < starts[:, None] + length)).sum(0).float()
