"""The plan of a sliding window: where windows lie, how finely their features are stitched, how often a cell is seen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

_GOLDEN_RATIO = (5**0.5 - 1) / 2


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
    def starts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tops and lefts of the windows in pixels, int64 each; every pair of them is a window."""
        tops, lefts = (window_starts(side, self.window, self.stride) for side in (self.height, self.width))
        return torch.tensor(tops), torch.tensor(lefts)

    @cached_property
    def origins(self) -> torch.Tensor:
        """(m, 2) int64, top and left of every window in pixels, row by row."""
        return torch.cartesian_prod(*self.starts)

    def __len__(self) -> int:
        return len(self.origins)

    @cached_property
    def probability(self) -> torch.Tensor:
        """(m,) float64, chance of each window when a cell is drawn evenly and then one of the windows that see it.

        Windows at the border, where others are few, are likelier than those in the middle; it sums to 1.
        """
        return torch.outer(*self._probability_along_sides).flatten()

    @cached_property
    def _probability_along_sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        # A window's chance is the sum of 1 / count over its cells, and counts are products of those of the two sides.
        sides = []
        for starts, seen in zip(self.starts, self._counts_along_sides):
            running = F.pad((1 / seen.double()).cumsum(0), (1, 0))
            first = starts // self.cell
            share = running[first + self.window_cells] - running[first]
            sides.append(share / share.sum())
        return sides[0], sides[1]

    def spread(self, count: int, shifts: torch.Tensor) -> torch.Tensor:
        """Choose windows by their :attr:`probability`, lying evenly over the image.

        A fixed pattern of points, evenly spread over the unit square (a lattice of the golden ratio), is shifted around
        the torus, and every point takes the window that its place falls to. With random shifts each point alone draws
        by the probability; together they overlap less than points drawn apart would.

        Args:
            count: windows to choose, at least 1.
            shifts: (B, 2), uniform in 0..1, one for each image.

        Returns:
            (B, count) int64 numbers of windows; a window may come up twice.
        """
        steps = torch.arange(count, dtype=torch.float64)
        pattern = torch.stack([steps / count, steps * _GOLDEN_RATIO], dim=1)
        points = (pattern + shifts[:, None].double()) % 1
        chosen = []
        for side, chances in enumerate(self._probability_along_sides):
            place = torch.searchsorted(chances.cumsum(0), points[..., side].contiguous(), right=True)
            # The sum of all chances may fall short of 1 by rounding.
            chosen.append(place.clamp(max=len(chances) - 1))
        return chosen[0] * len(self.starts[1]) + chosen[1]

    @cached_property
    def shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What each window's patches add to the patches of the full target, along each side.

        A window's features are refined to cells, laid where they lie, divided by how many windows see a cell, and
        brought back to patches. All of this is linear, and a product of the same along rows and along columns. So the
        full target is the sum over all windows of ``rows @ features @ columns.T`` for each channel, with the matrices
        of the window's top and left.

        Returns:
            Rows (tops, h, w) and columns (lefts, h, w), float32: to h patches of the image from w of the window.
        """
        sides = zip(self.starts, self._counts_along_sides, (self.height, self.width))
        rows, columns = (self._shares_along(*side) for side in sides)
        return rows, columns

    def _shares_along(self, starts: torch.Tensor, seen: torch.Tensor, length: int) -> torch.Tensor:
        refine = F.interpolate(
            torch.eye(self.window // self.patch, dtype=torch.float64)[None],
            size=self.window_cells,
            mode="linear",
            align_corners=False,
        )[0].T
        # A patch of the target is read between two cells (bilinear, align_corners=False).
        patches = length // self.patch
        middle = (torch.arange(patches, dtype=torch.float64) + 0.5) * (len(seen) / patches) - 0.5
        before = middle.floor().long()
        cells = torch.stack([before, (before + 1).clamp(max=len(seen) - 1)], dim=1)
        weights = torch.stack([1 - (middle - before), middle - before], dim=1) / seen[cells]
        # (starts, patches, 2): those cells as the window counts them, where it has them.
        own = cells - (starts // self.cell)[:, None, None]
        weights = weights * ((own >= 0) & (own < self.window_cells))
        return (weights[..., None] * refine[own.clamp(0, self.window_cells - 1)]).sum(2).float()

    @cached_property
    def rows_reached(self) -> torch.Tensor:
        """(tops, 2) int64, first row of the target's patches that windows of each top add to, and the row after the
        last."""
        reached = self.shares[0].any(2).int()
        return torch.stack([reached.argmax(1), reached.shape[1] - reached.flip(1).argmax(1)], dim=1)

    @cached_property
    def counts(self) -> torch.Tensor:
        """(rows, columns) float32, how many windows of the full plan cover each mosaic cell; at least 1."""
        return torch.outer(*self._counts_along_sides)

    @cached_property
    def _counts_along_sides(self) -> list[torch.Tensor]:
        sides = zip(self.starts, self.mosaic_size)
        return [_coverage(starts // self.cell, self.window_cells, total) for starts, total in sides]


def _coverage(starts: torch.Tensor, length: int, total: int) -> torch.Tensor:
    """(total,) float32, how many of the intervals [start, start + length) contain each place."""
    places = torch.arange(total)
    return ((places >= starts[:, None]) & (places < starts[:, None] + length)).sum(0).float()
