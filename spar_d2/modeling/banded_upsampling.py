"""Upsamples score maps to full resolution a chunk of rows at a time. Plain PyTorch, on the device of the maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

# Size in bytes of one chunk of upsampled scores: it fits a CPU's cache, or keeps a GPU busy.
_BAND_BYTES = {"cpu": 2 << 20, "other": 64 << 20}
_LISTED_PIXELS = 1 << 20


def covered_size(cells: Sequence[int], patch: int, given: Sequence[int], size: Sequence[int]) -> tuple[float, float]:
    """Return the size in result pixels of the area that the patches of an image cover.

    Args:
        cells: (h, w) of the feature grid.
        patch: patch size in image pixels.
        given: (H, W) of the image, in pixels.
        size: (H, W) of the result, in pixels.
    """
    # Integer products first and a single division last: the result is rounded once and never below `size`.
    height, width = (number * patch * wanted / side for number, wanted, side in zip(cells, size, given))
    return height, width


@dataclass(frozen=True)
class ScoreMap:
    """Scores of all queries on a feature grid over an image.

    Attributes:
        scores: (h, w, Q) float32.
        padded_size: height and width in result pixels of the area that the grid covers, from the top left. May be
            fractional. None: the size of the result.
        mirrored: whether the grid belongs to the horizontally flipped image.
    """

    scores: torch.Tensor
    padded_size: tuple[float, float] | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Resampling:
    """Bilinear resampling along one axis (align_corners=False): every pixel lies between two grid cells.

    Attributes:
        cells: number of grid cells along this axis.
        covered: number of pixels that they cover.
        wanted: number of output pixels, from the first one.
        mirrored: whether the output pixels are in reverse order.
        device: device of the tensors, which have shape (wanted,).
    """

    cells: int
    covered: float
    wanted: int
    mirrored: bool
    device: torch.device

    @cached_property
    def position(self) -> torch.Tensor:
        """Position of each output pixel in cells, float32 in 0..cells - 1."""
        pixels = torch.arange(self.wanted, device=self.device, dtype=torch.float32)
        if self.mirrored:
            pixels = pixels.flip(0)
        return ((pixels + 0.5) * (self.cells / self.covered) - 0.5).clamp(0, self.cells - 1)

    @cached_property
    def before(self) -> torch.Tensor:
        """Index of the cell at or before the position, int64."""
        return self.position.long()

    @cached_property
    def after(self) -> torch.Tensor:
        """Index of the next cell, int64, clamped to the last cell."""
        return (self.before + 1).clamp(max=self.cells - 1)

    @cached_property
    def fraction(self) -> torch.Tensor:
        """Fraction of the distance from ``before`` to ``after``, float32 in 0..1."""
        return self.position - self.before

    def around(self, pixels: slice) -> tuple[int, int]:
        """Range (first, last) of cells that a slice of pixels needs, with a margin; computed without the device."""
        ends = [self.wanted - 1 - place if self.mirrored else place for place in (pixels.start, pixels.stop - 1)]
        first, last = (math.floor((place + 0.5) * (self.cells / self.covered) - 0.5) for place in sorted(ends))
        # The float32 positions may differ slightly from these, so add a cell on each side.
        return max(0, min(first - 1, self.cells - 1)), min(last + 2, self.cells - 1)


@dataclass(frozen=True)
class Upsampling:
    """Scores (h, w, Q) and the positions of the result's rows and columns between their cells."""

    scores: torch.Tensor
    down: Resampling
    across: Resampling

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return scores (rows, columns, Q) of a block."""
        down, across = self.down, self.across
        # (rows, w, Q), then (rows, columns, Q). Queries come last, so that all steps access contiguous memory.
        first, last = across.around(columns)
        cells = self.scores[:, first : last + 1]
        band = torch.lerp(cells[down.before[rows]], cells[down.after[rows]], down.fraction[rows, None, None])
        before, after = across.before[columns] - first, across.after[columns] - first
        return torch.lerp(band[:, before], band[:, after], across.fraction[columns, None])

    def pixels(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return scores (n, Q) of n single pixels."""
        above, below = self.down.before[y], self.down.after[y]
        fraction = self.down.fraction[y, None]
        left, right = (
            torch.lerp(self.scores[above, column], self.scores[below, column], fraction)
            for column in (self.across.before[x], self.across.after[x])
        )
        return torch.lerp(left, right, self.across.fraction[x, None])


class UpsampledScores:
    """Scores upsampled bilinearly and averaged over maps, computed in chunks.

    Args:
        maps: one or more score maps of the same queries on the same device. Scores are cast to float32.
        size: (H, W) of the result, from the top left.
        values: numbers that the caller computes for each pixel of a chunk, if they are more than its scores.

    Attributes:
        maps: score maps with float32 scores and a ``padded_size``.
        grids: scores with their resampling positions.
        size, device, queries: (H, W) of the result, device of the scores, and number of queries Q.

    Raises:
        ValueError: there are no maps, the size is not positive, or a ``padded_size`` is smaller than ``size``.
    """

    def __init__(self, maps: Sequence[ScoreMap], size: tuple[int, int], values: int = 0) -> None:
        height, width = size
        if min(size) < 1:
            raise ValueError(f"size must be at least 1x1, got {height}x{width}")
        if not len(maps):
            raise ValueError("maps must have at least one score map, got none")
        self.size = (height, width)
        self.maps: list[ScoreMap] = []
        self.grids: list[Upsampling] = []
        for grid in maps:
            scores, padded = grid.scores.float(), grid.padded_size or size
            if padded[0] < height or padded[1] < width:
                raise ValueError(f"padded_size must be at least size {height}x{width}, got {tuple(padded)}")
            down = Resampling(scores.shape[0], padded[0], height, False, scores.device)
            across = Resampling(scores.shape[1], padded[1], width, grid.mirrored, scores.device)
            self.maps.append(ScoreMap(scores, padded, grid.mirrored))
            self.grids.append(Upsampling(scores, down, across))
        self.device, self.queries = scores.device, scores.shape[2]
        budget = _BAND_BYTES.get(self.device.type, _BAND_BYTES["other"])
        self._pixels_at_once = max(1, budget // (max(self.queries, values) * scores.element_size()))

    def bands(self) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
        """Yield index slices (rows, columns) of a chunk and its scores (rows, columns, Q), from top to bottom.

        A chunk has all columns, unless a single row would be too large.
        """
        height, width = self.size
        rows, columns = max(1, self._pixels_at_once // width), min(width, self._pixels_at_once)
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                place = slice(top, min(top + rows, height)), slice(left, min(left + columns, width))
                yield place, _mean(grid.block(*place) for grid in self.grids)

    def pixels(self, chosen: torch.Tensor) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Yield indices (y, x) of pixels selected by a mask (H, W) bool, in chunks, and their scores (n, Q).

        Synchronizes with the device.
        """
        # A list of all selected pixels could be larger than the labels.
        step = max(1, _LISTED_PIXELS // self.size[1])
        for start in range(0, self.size[0], step):
            for part in chosen[start : start + step].nonzero().split(self._pixels_at_once):
                y, x = part[:, 0] + start, part[:, 1]
                yield (y, x), _mean(grid.pixels(y, x) for grid in self.grids)


def _mean(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    total, count = next(tensors), 1
    for tensor in tensors:
        total, count = total.add_(tensor), count + 1
    return total if count == 1 else total.div_(count)
