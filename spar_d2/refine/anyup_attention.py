"""Local-window attention from the pixels of the output to the cells of a feature grid, in bands and tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from spar_d2.encoders.precision import full_float32
from spar_d2.refine.anyup_encoding import BandedEncoder, pool
from spar_d2.refine.anyup_layers import HEADS, SHORTEST, WIDTH, convolve
from spar_d2.utils.transfer import send

if TYPE_CHECKING:
    from spar_d2.refine.anyup import AnyUp

# Windows reach this share of the image in each direction.
_REACH = 0.1
_BAND_PIXELS = 1 << 16
# Largest side of a tile, and elements of its attention matrix. They should fit into the cache of a CPU.
_LONGEST_TILE = 64
_TILE_ELEMENTS = {"cpu": 600_000, "other": 1 << 24}


class LocalAttention:
    """Attention of one size of output, for the images of a batch. :meth:`AnyUp.prepare` creates it.

    The attention weights of a pixel are at least 0 and sum to 1, so results are weighted means of the values.

    Attributes:
        size: (oh, ow) of the output.
        grid: (h, w) of the values.
    """

    def __init__(
        self,
        model: AnyUp,
        features: torch.Tensor,
        size: tuple[int, int],
        image_size: tuple[int, int],
        images: Sequence[tuple[BandedEncoder, torch.Tensor]],
    ) -> None:
        """Prepare the attention from the encoded queries and the keys (h * w, 128) of each image."""
        self.size, self.grid = size, (features.shape[2], features.shape[3])
        self._model, self._features, self._image_size = model, features, image_size
        # (heads, h, w, 32)
        self._keys = [k.unflatten(0, self.grid).unflatten(2, (HEADS, -1)).movedim(2, 0) for _, k in images]
        self._queries = [encoder for encoder, _ in images]
        self._windows = [window_borders(pixels, cells) for pixels, cells in zip(size, self.grid)]
        # 0 inside a window and -inf outside, (oh, h) and (ow, w).
        self._biases = [
            send(_bias(*windows, cells), features.device) for windows, cells in zip(self._windows, self.grid)
        ]
        self._tile = _tile_side(size, self.grid, features.device)

    def bands(self) -> Iterator[slice]:
        """Yield slices of rows of a suitable size, from top to bottom."""
        height, width = self.size
        # A band also computes one row of pixels above and one below, so that it should have many rows.
        step = max(self._tile, _BAND_PIXELS // width // self._tile * self._tile)
        for start in range(0, height, step):
            yield slice(start, min(start + step, height))

    @torch.no_grad()
    def rows(self, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """Apply the attention to any values on the grid, for some rows of the output.

        Args:
            values: (B, V, h, w) floating point, for example features, or class scores of :meth:`project`.
            rows: rows of the output, without a step. Memory is proportional to their number, see :meth:`bands`.

        Returns:
            (B, V, rows, ow) in the dtype of ``values``. Computed in float32.

        Raises:
            ValueError: ``values`` are not on the grid, or ``rows`` are not within the output.
        """
        rows = self._check_rows(rows)
        expected = (len(self._keys), *self.grid)
        if values.ndim != 4 or (len(values), *values.shape[2:]) != expected or not values.is_floating_point():
            raise ValueError(
                f"values must be floating-point (B, V, h, w) with B, h, w = {expected}, "
                f"got {tuple(values.shape)} {values.dtype}"
            )
        with full_float32(values.device):
            bands = [self._attend(number, value.float(), rows) for number, value in enumerate(values)]
        output = bands[0][None] if len(bands) == 1 else torch.stack(bands)
        return output.to(values.dtype)

    def project(self, text: torch.Tensor) -> torch.Tensor:
        """Compute the products (B, Q, h, w) float32 of the features, of their own length, and text (Q, C)."""
        return self._products(self._features, text)

    def scores(self, text: torch.Tensor, rows: slice) -> torch.Tensor:
        """Compute the products of upsampled features and text embeddings, for some rows.

        The attention is linear, so it is applied to the products on the grid, and the upsampled features are never
        computed. The length of an upsampled feature is a common factor of the scores of a pixel: the best class is that
        of :meth:`cosines`. For several bands, it is faster to call :meth:`project` once, then :meth:`rows`.

        Args:
            text: (Q, C) unit vectors.
            rows: rows of the output, see :meth:`rows`.

        Returns:
            (B, Q, rows, ow) float32.
        """
        return self.rows(self.project(text), rows)

    def cosines(self, text: torch.Tensor, rows: slice) -> torch.Tensor:
        """Compute the cosine similarity of upsampled features and text embeddings, for some rows.

        Probabilities and thresholds need cosines. The features are upsampled, so it takes longer than :meth:`scores`.

        Args:
            text: (Q, C) unit vectors.
            rows: rows of the output, see :meth:`rows`.

        Returns:
            (B, Q, rows, ow) float32 in -1..1.
        """
        upsampled = self.rows(self._features.float(), rows)
        return self._products(F.normalize(upsampled, dim=1, eps=SHORTEST), text)

    @torch.no_grad()
    def _products(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        channels = features.shape[1]
        if text.ndim != 2 or text.shape[1] != channels or not text.is_floating_point():
            raise ValueError(
                f"text must be floating-point (Q, C) with C = {channels} channels of the features, "
                f"got {tuple(text.shape)} {text.dtype}"
            )
        with full_float32(text.device):
            return torch.einsum("qc,bchw->bqhw", text.float(), features.float())

    def _check_rows(self, rows: slice) -> slice:
        start, stop = rows.start or 0, self.size[0] if rows.stop is None else rows.stop
        if rows.step not in (None, 1) or not 0 <= start < stop <= self.size[0]:
            raise ValueError(f"rows must be a slice of the {self.size[0]} rows of the output, without step, got {rows}")
        return slice(start, stop)

    def _attend(self, number: int, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """Apply the attention of an image to values (V, h, w), and return (V, rows, ow)."""
        queries, keys = self._project_queries(number, rows), self._keys[number]
        # Values of a cell are contiguous.
        values = values.permute(1, 2, 0).contiguous()
        output = values.new_empty(rows.stop - rows.start, self.size[1], values.shape[2])
        for top in range(rows.start, rows.stop, self._tile):
            down = slice(top, min(top + self._tile, rows.stop))
            inside = slice(down.start - rows.start, down.stop - rows.start)
            for left in range(0, self.size[1], self._tile):
                across = slice(left, min(left + self._tile, self.size[1]))
                cells = tuple(
                    slice(int(first[part].min()), int(last[part].max()))
                    for (first, last), part in zip(self._windows, (down, across))
                )
                row_bias, column_bias = (
                    bias[part, cell] for bias, part, cell in zip(self._biases, (down, across), cells)
                )
                # (tile height, tile width, cells down, cells across) -> (pixels, cells)
                bias = (row_bias[:, None, :, None] + column_bias[:, None, :]).flatten(0, 1).flatten(1)
                query = queries[inside, across].flatten(0, 1).unflatten(1, (HEADS, -1)).transpose(0, 1)
                key = keys[(slice(None), *cells)].flatten(1, 2).transpose(1, 2)
                # The mean over heads first: all heads attend to the same values.
                weights = torch.baddbmm(bias, query, key).softmax(-1).mean(0)
                output[inside, across] = (weights @ values[cells].flatten(0, 1)).view_as(output[inside, across])
        return output.permute(2, 0, 1)

    def _project_queries(self, number: int, rows: slice) -> torch.Tensor:
        """Compute queries (rows, ow, 128), scaled for the softmax."""
        height, width = self.size
        decode = self._model.cross_decode
        # The 3x3 convolution needs one row above and one below; outside of the image, they are 0.
        around = slice(max(rows.start - 1, 0), min(rows.stop + 1, height))
        pooled = pool(self._queries[number], self._image_size, self.size, around, self._features.device)
        padding = (0, 0, 1, 1, int(rows.start == 0), int(rows.stop == height))
        x = convolve(F.pad(pooled, padding), decode.conv2d)
        return decode.cross_attn.queries(x.reshape(-1, WIDTH)).unflatten(0, (-1, width))


def window_borders(pixels: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first cell, and the one after the last cell, of the window of each pixel along one side.

    Computed in float32 with each operation rounded, because the published weights were evaluated with that: a window
    changes by a cell where an exact border is an integer.
    """
    center = (np.arange(pixels, dtype=np.float32) + np.float32(0.5)) / np.float32(pixels)
    reach, one = np.float32(_REACH), np.float32(1)
    first = np.floor(np.clip(center - reach, np.float32(0), one) * np.float32(cells))
    last = np.ceil(np.clip(center + reach, np.float32(0), one) * np.float32(cells))
    return first.astype(np.int64), last.astype(np.int64)


def _bias(first: np.ndarray, last: np.ndarray, cells: int) -> torch.Tensor:
    cell = np.arange(cells)
    inside = (cell >= first[:, None]) & (cell < last[:, None])
    return torch.from_numpy(np.where(inside, np.float32(0), np.float32(-np.inf)))


def _tile_side(size: tuple[int, int], grid: tuple[int, int], device: torch.device) -> int:
    """Return the largest power of two, up to a limit, whose attention matrix is small enough."""
    limit = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS["other"])

    def elements(side: int) -> float:
        tile = (min(side, pixels) for pixels in size)
        reached = (min(cells, cells * (side / pixels + 2 * _REACH) + 2) for pixels, cells in zip(size, grid))
        return HEADS * math.prod(tile) * math.prod(reached)

    side = _LONGEST_TILE
    while side > 1 and elements(side) > limit:
        side //= 2
    return side
