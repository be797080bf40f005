"""Score maps upsampled to full resolution, a band of rows at a time. Plain PyTorch, on the device of the maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    return tuple(number * patch * wanted / side for number, wanted, side in zip(cells, size, given))


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
class _Resampling:
    """Bilinear resampling along one side (align_corners=False): each place lies between two source places."""

    before: torch.Tensor
    after: torch.Tensor
    fraction: torch.Tensor

    @classmethod
    def along(cls, source: int, covered: float, wanted: int, device: torch.device, mirrored: bool) -> _Resampling:
        """``source`` cells cover ``covered`` pixels, of which the first ``wanted`` are asked for."""
        places = torch.arange(wanted, device=device, dtype=torch.float32)
        if mirrored:
            places = places.flip(0)
        position = ((places + 0.5) * (source / covered) - 0.5).clamp(0, source - 1)
        before = position.long()
        return cls(before, (before + 1).clamp(max=source - 1), position - before)


@dataclass(frozen=True)
class _Upsampling:
    """A score map and where between its cells the rows and columns of the result lie."""

    scores: torch.Tensor
    down: _Resampling
    across: _Resampling

    def block(self, rows: slice, columns: slice) -> torch.Tensor:
        """Scores (rows, columns, Q)."""
        down, across = self.down, self.across
        # (rows, w, Q), then (rows, columns, Q): queries last, so that every step moves whole runs of memory.
        first, last = int(across.before[columns].min()), int(across.after[columns].max()) + 1
        cells = self.scores[:, first:last]
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
        maps: at least one, all of the same queries on one device.
        size: (H, W), the pixels wanted, counted from the top left.

    Raises:
        ValueError: a size that is not positive, or a ``padded_size`` smaller than ``size``.
    """

    def __init__(self, maps: Sequence[ScoreMap], size: tuple[int, int]) -> None:
        height, width = size
        if min(size) < 1:
            raise ValueError(f"size must be at least 1x1, got {height}x{width}")
        self._height, self._width = height, width
        self._maps = []
        for grid in maps:
            scores, padded = grid.scores, grid.padded_size or size
            if padded[0] < height or padded[1] < width:
                raise ValueError(f"padded_size must be at least size {height}x{width}, got {tuple(padded)}")
            down = _Resampling.along(scores.shape[0], padded[0], height, scores.device, mirrored=False)
            across = _Resampling.along(scores.shape[1], padded[1], width, scores.device, grid.mirrored)
            self._maps.append(_Upsampling(scores, down, across))
        budget = _BAND_BYTES.get(scores.device.type, _BAND_BYTES["other"])
        self._pixels_at_once = max(1, budget // (scores.shape[2] * scores.element_size()))

    def bands(self) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
        """Rows and columns of a part of the result and its scores (rows, columns, Q), from the top to the bottom.

        A part has all columns, unless a single row would be too large.
        """
        height, width = max(1, self._pixels_at_once // self._width), min(self._width, self._pixels_at_once)
        for top in range(0, self._height, height):
            for left in range(0, self._width, width):
                place = (
                    slice(top, min(top + height, self._height)),
                    slice(left, min(left + width, self._width)),
                )
                yield place, _mean(grid.block(*place) for grid in self._maps)

    def pixels(self, chosen: torch.Tensor) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Pixels (y, x) chosen by a mask (H, W) bool, some at a time, and their scores (n, Q)."""
        # A list of all of them would be larger than the labels.
        step = max(1, _LISTED_PIXELS // self._width)
        for start in range(0, self._height, step):
            for part in chosen[start : start + step].nonzero().split(self._pixels_at_once):
                y, x = part[:, 0] + start, part[:, 1]
                yield (y, x), _mean(grid.pixels(y, x) for grid in self._maps)


def _mean(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
    total, count = next(tensors), 1
    for tensor in tensors:
        total, count = total.add_(tensor), count + 1
    return total if count == 1 else total.div_(count)
