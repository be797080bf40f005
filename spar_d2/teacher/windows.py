"""Sliding-window plans: window positions, resolution of the stitching grid, and coverage counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

_GOLDEN_RATIO = (5**0.5 - 1) / 2


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the window positions along one side: one per stride, plus one aligned with the end if needed."""
    starts = list(range(0, length - window + 1, stride))
    if starts[-1] != length - window:
        starts.append(length - window)
    return starts


def upsample_factor(patch: int, stride: int) -> int:
    """Return the smallest upsampling factor of the patch grid for which the stride is a whole number of grid cells."""
    return next(r for r in range(1, patch + 1) if patch % r == 0 and stride % (patch // r) == 0)


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one image, and the fine grid on which their features are averaged.

    Attributes:
        height, width: size of the padded image in pixels, at least ``window`` each.
        window: side of a window in pixels, a multiple of ``patch``.
        stride: stride between windows in pixels.
        patch: side of a patch in pixels.
    """

    height: int
    width: int
    window: int
    stride: int
    patch: int

    @cached_property
    def factor(self) -> int:
        """Number of fine grid cells per patch along each side."""
        return upsample_factor(self.patch, self.stride)

    @property
    def cell(self) -> int:
        """Side of a fine grid cell in pixels."""
        return self.patch // self.factor

    @property
    def window_cells(self) -> int:
        """Number of fine grid cells per window along each side."""
        return self.window // self.cell

    @property
    def mosaic_size(self) -> tuple[int, int]:
        """Size of the fine grid of the image, (rows, columns)."""
        return self.height // self.cell, self.width // self.cell

    @cached_property
    def starts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Top and left positions of windows in pixels, int64 each; every combination is a window."""
        tops, lefts = (window_starts(side, self.window, self.stride) for side in (self.height, self.width))
        return torch.tensor(tops), torch.tensor(lefts)

    @cached_property
    def origins(self) -> torch.Tensor:
        """Top and left of each window in pixels, (m, 2) int64, in row-major order."""
        return torch.cartesian_prod(*self.starts)

    def __len__(self) -> int:
        return len(self.origins)

    @cached_property
    def probability(self) -> torch.Tensor:
        """Sampling probability of each window, (m,) float64, sums to 1.

        It is the probability of sampling a grid cell uniformly, and then one of the windows that cover it. Windows at
        the border are more likely, because fewer windows overlap there.
        """
        return torch.outer(*self._probability_along_sides).flatten()

    @cached_property
    def _probability_along_sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        # The probability of a window is proportional to the sum of 1 / count over its grid cells. It is separable,
        # because counts are products of the counts along both sides.
        sides = []
        for starts, counts in zip(self.starts, self._counts_along_sides):
            cumulative = F.pad((1 / counts.double()).cumsum(0), (1, 0))
            first = starts // self.cell
            share = cumulative[first + self.window_cells] - cumulative[first]
            sides.append(share / share.sum())
        return sides[0], sides[1]

    def spread(self, count: int, shifts: torch.Tensor) -> torch.Tensor:
        """Sample windows with their :attr:`probability`, spread evenly over the image.

        A golden-ratio lattice of points in the unit square is shifted cyclically, and each point is mapped to a window
        with the inverse cumulative distribution. With uniform random shifts, each point samples a window with its
        probability. The sampled windows overlap less than independent samples.

        Args:
            count: number of windows, at least 1.
            shifts: (B, 2) uniform random numbers in 0..1, one pair per image.

        Returns:
            (B, count) int64 window indices, possibly with duplicates.
        """
        steps = torch.arange(count, dtype=torch.float64)
        pattern = torch.stack([steps / count, steps * _GOLDEN_RATIO], dim=1)
        points = (pattern + shifts[:, None].double()) % 1
        chosen = []
        for side, probability in enumerate(self._probability_along_sides):
            index = torch.searchsorted(probability.cumsum(0), points[..., side].contiguous(), right=True)
            # The cumulative sum may be less than 1 because of rounding.
            chosen.append(index.clamp(max=len(probability) - 1))
        return chosen[0] * len(self.starts[1]) + chosen[1]

    @cached_property
    def shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrices that map window features to their contribution to the full target, along each side.

        The features of a window are upsampled to the fine grid, placed at the window's position, divided by the
        coverage counts, and downsampled to patches. These operations are linear and separable. Therefore, the full
        target is the sum of ``rows @ features @ columns.T`` over all windows, for each channel.

        Returns:
            Row matrices (tops, h, w) and column matrices (lefts, h, w), float32, which map w patches of the window to h
            patches of the image.
        """
        sides = zip(self.starts, self._counts_along_sides, (self.height, self.width))
        rows, columns = (self._shares_along(*side) for side in sides)
        return rows, columns

    def _shares_along(self, starts: torch.Tensor, counts: torch.Tensor, length: int) -> torch.Tensor:
        upsampling = F.interpolate(
            torch.eye(self.window // self.patch, dtype=torch.float64)[None],
            size=self.window_cells,
            mode="linear",
            align_corners=False,
        )[0].T
        # Each patch of the target is interpolated between two grid cells (bilinear, align_corners=False).
        patches = length // self.patch
        center = (torch.arange(patches, dtype=torch.float64) + 0.5) * (len(counts) / patches) - 0.5
        before = center.floor().long()
        cells = torch.stack([before, (before + 1).clamp(max=len(counts) - 1)], dim=1)
        weights = torch.stack([1 - (center - before), center - before], dim=1) / counts[cells]
        # (starts, patches, 2): indices of these cells within each window; cells outside have weight 0.
        window_cells = cells - (starts // self.cell)[:, None, None]
        weights = weights * ((window_cells >= 0) & (window_cells < self.window_cells))
        return (weights[..., None] * upsampling[window_cells.clamp(0, self.window_cells - 1)]).sum(2).float()

    @cached_property
    def rows_reached(self) -> torch.Tensor:
        """Range of target rows [first, last + 1) that windows at each top contribute to, (tops, 2) int64."""
        reached = self.shares[0].any(2).int()
        return torch.stack([reached.argmax(1), reached.shape[1] - reached.flip(1).argmax(1)], dim=1)

    @cached_property
    def counts(self) -> torch.Tensor:
        """Number of windows of the full plan that cover each fine grid cell, (rows, columns) float32; at least 1."""
        return torch.outer(*self._counts_along_sides)

    @cached_property
    def _counts_along_sides(self) -> list[torch.Tensor]:
        sides = zip(self.starts, self.mosaic_size)
        return [_coverage(starts // self.cell, self.window_cells, total) for starts, total in sides]


def _coverage(starts: torch.Tensor, length: int, total: int) -> torch.Tensor:
    """Return how many of the intervals [start, start + length) contain each position, (total,) float32."""
    positions = torch.arange(total)
    return ((positions >= starts[:, None]) & (positions < starts[:, None] + length)).sum(0).float()
