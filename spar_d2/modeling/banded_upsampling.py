"""Score maps upsampled to full resolution, a band of rows at a time. Plain PyTorch, on the device of the maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

# Bytes of one band of upsampled scores: what a CPU's cache holds, or enough work for a GPU.
_BAND_BYTES = {"cpu": 2 << 20, "other": 64 << 20}
_LISTED_PIXELS = 1 << 20


def covered_size(cells: Sequence[int], patch: int, given: Sequence[int], size: Sequence[int]) -> tuple[float, float]:
    """What the cells of an image's whole patches cover, in pixels of the result.

    Args:
        cells: (h, w) of the grid.
        patch: side of a cell in pixels of the image.
        given: (H, W) of the image, in pixels.
        size: (H, W) of the result, in pixels.
    """
    # Whole numbers first and one division last: the result is rounded once and never below `size`.
    height, width = (number * patch * wanted / side for number, wanted, side in zip(cells, size, given))
    return height, width


@dataclass(frozen=True)
class ScoreMap:
    """Scores of every query on a grid over an image.

    Attributes:
        scores: (h, w, Q) float32.
        padded_size: pixels of the result that the grid covers, from its top left; may be fractional; None: all of it.
        mirrored: the grid is over the mirror image; its right side is then what lies at the left of the result.
    """

    scores: torch.Tensor
    padded_size: tuple[float, float] | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Resampling:
    """Bilinear resampling along one side (align_corners=False): each place lies between two cells.

    Attributes:
        cells: of the grid along this side.
        covered: pixels that they cover.
        wanted: pixels asked for, counted from the first.
        mirrored: whether the last of those comes first.
        device: of the tensors, each (wanted,).
    """

    cells: int
    covered: float
    wanted: int
    mirrored: bool
    device: torch.device

    @cached_property
    def position(self) -> torch.Tensor:
        """In cells, float32 in 0..cells - 1."""
        places = torch.arange(self.wanted, device=self.device, dtype=torch.float32)
        if self.mirrored:
            places = places.flip(0)
        return ((places + 0.5) * (self.cells / self.covered) - 0.5).clamp(0, self.cells - 1)

    @cached_property
    def before(self) -> torch.Tensor:
        """The cell at or before the position, int64."""
        return self.position.long()

    @cached_property
    def after(self) -> torch.Tensor:
        """The one after it, int64; the last has none but itself."""
        return (self.before + 1).clamp(max=self.cells - 1)

    @cached_property
    def fraction(self) -> torch.Tensor:
        """Of the way from the one to the other, float32 in 0..1."""
        return self.position - self.before

    def around(self, part: slice) -> tuple[int, int]:
        """First and last cell, and a few more, that the places of a part lie between; without asking the device."""
        ends = [self.wanted - 1 - place if self.mirrored else place for place in (part.start, part.stop - 1)]
        first, last = (math.floor((place + 0.5) * (self.cells / self.covered) - 0.5) for place in sorted(ends))
        # Float32 positions differ a little from these: a cell more on each side.
        return max(0, min(first - 1, self.cells - 1)), min(last + 2, self.cells - 1)


@dataclass(frozen=True)
class Upsampling:
    """Scores (h, w, Q) and where between their cells the rows and columns of the result lie."""

    scores: torch.Tensor
    down: Resampling
    across: Resampling

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        """Scores (rows, columns, Q)."""
        down, across = self.down, self.across
        # (rows, w, Q), then (rows, columns, Q): queries last, so that every step moves whole runs of memory.
        first, last = across.around(columns)
        cells = self.scores[:, first : last + 1]
        band = torch.lerp(cells[down.before[rows]], cells[down.after[rows]], down.fraction[rows, None, None])
        before, after = across.before[columns] - first, across.after[columns] - first
        return torch.lerp(band[:, before], band[:, after], across.fraction[columns, None])

    def pixels(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Scores (n, Q) of n single pixels."""
        above, below = self.down.before[y], self.down.after[y]
        fraction = self.down.fraction[y, None]
        left, right = (
            torch.lerp(self.scores[above, column], self.scores[below, column], fraction)
            for column in (self.across.before[x], self.across.after[x])
        )
        return torch.lerp(left, right, self.across.fraction[x, None])


class UpsampledScores:
    """Scores upsampled bilinearly and averaged over maps, computed a part at a time.

    Args:
        maps: at least one, all of the same queries on one device; scores of other types are cast to float32.
        size: (H, W), the pixels wanted, counted from the top left.

    Attributes:
        maps: with float32 scores and a ``padded_size`` each.
        grids: their scores, and the places between them.
        size, device, queries: (H, W), where the scores are, and Q.

    Raises:
        ValueError: no maps, a size that is not positive, or a ``padded_size`` smaller than ``size``.
    """

    def __init__(self, maps: Sequence[ScoreMap], size: tuple[int, int]) -> None:
        height, width = size
        if min(size) < 1:
            raise ValueError(f"size must be at least 1x1, got {height}x{width}")
        if not len(maps):
            raise ValueError("maps must have at least one map of scores, got none")
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
        self._pixels_at_once = max(1, budget // (self.queries * scores.element_size()))

    def bands(self) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
        """Rows and columns of a part of the result and its scores (rows, columns, Q), from the top to the bottom.

        A part has all columns, unless a single row would be too large.
        """
        height, width = self.size
        rows, columns = max(1, self._pixels_at_once // width), min(width, self._pixels_at_once)
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                place = slice(top, min(top + rows, height)), slice(left, min(left + columns, width))
                yield place, _mean(grid.block(*place) for grid in self.grids)

    def pixels(self, chosen: torch.Tensor) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Pixels (y, x) chosen by a mask (H, W) bool, some at a time, and their scores (n, Q).

        The host waits for the device.
        """
        # A list of all of them would be larger than the labels.
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
