"""Encoding of the image by AnyUp in chunks of rows, for bounded memory.

A map of 128 channels at the image's resolution can be larger than all other data together. Four passes collect the
statistics of the group normalizations, then any rows can be computed. As many rows as the memory limit allows are kept
between passes; others are computed again from the image. The results are those of whole maps, except for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from spar_d2.refine.anyup_layers import WIDTH, Affine, Encoder, Moments, pointwise, rotate

if TYPE_CHECKING:
    from spar_d2.refine.anyup import AnyUp

# Computes pixels (rows * width, channels) of a slice of rows.
ReadRows = Callable[[slice], torch.Tensor]
# Pixels of a chunk: it should fit into the cache of a CPU, and occupy a GPU.
_CHUNK_PIXELS = {"cpu": 4096, "other": 1 << 16}
_PIXEL_BYTES = 4 * WIDTH
# Odd 64-bit numbers, for a hash of the three channels.
_HASH = (-7046029254386353131, -4417276706812531889, 1609587929392839161)


def chunks(rows: slice, width: int, device: torch.device) -> Iterator[slice]:
    """Split a slice of rows into slices with a suitable number of pixels."""
    step = max(1, _CHUNK_PIXELS.get(device.type, _CHUNK_PIXELS["other"]) // width)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


class BandedEncoder:
    """Output of an encoder, computed for any rows of a map.

    Args:
        encoder: encoder with a pointwise first layer.
        read: reads inputs of the first layer.
        height, width: size of the map.
        kept_bytes: limit of the memory of kept rows.
        device: device of the map.
        weights: (height * width,) how many times each pixel counts in the statistics; default: once.
    """

    def __init__(
        self,
        encoder: Encoder,
        read: ReadRows,
        height: int,
        width: int,
        kept_bytes: int,
        device: torch.device,
        weights: torch.Tensor | None = None,
    ) -> None:
        self._encoder, self._read, self._width = encoder, read, width
        kept_rows = min(height, kept_bytes // (width * _PIXEL_BYTES))
        # Inputs (kept_rows * width, 128) of block number `_done`; the output, if all rows are kept.
        self._kept = torch.empty(kept_rows * width, WIDTH, device=device)
        self._done: int | None = None
        self._affines: list[Affine] = []
        for step, norm in enumerate(encoder.norms):
            moments = Moments()
            for rows in self._chunks(slice(0, height)):
                x, pixels = self._partial(rows), self._pixels(rows)
                # Before a block, and not within.
                if step % 2 == 0 and rows.stop <= kept_rows:
                    self._kept[pixels] = x
                moments.add(x, None if weights is None else weights[pixels])
            self._affines.append(moments.affine(norm))
            self._done = step // 2
        self.finished = kept_rows == height
        if self.finished:
            for rows in self._chunks(slice(0, height)):
                self._kept[self._pixels(rows)] = self._partial(rows)

    def __call__(self, rows: slice) -> torch.Tensor:
        """Compute the output (rows * width, 128); the caller must not change it."""
        if self.finished:
            return self._kept[self._pixels(rows)]
        output = self._kept.new_empty(rows.stop - rows.start, self._width, WIDTH)
        for part in self._chunks(rows):
            inside = slice(part.start - rows.start, part.stop - rows.start)
            output[inside] = self._partial(part).view_as(output[inside])
        return output.flatten(0, 1)

    def _pixels(self, rows: slice) -> slice:
        return slice(rows.start * self._width, rows.stop * self._width)

    def _chunks(self, rows: slice) -> Iterator[slice]:
        """Split a slice of rows into chunks, in each of which all rows are kept, or none."""
        border = min(max(len(self._kept) // self._width, rows.start), rows.stop)
        for part in (slice(rows.start, border), slice(border, rows.stop)):
            yield from chunks(part, self._width, self._kept.device)

    def _partial(self, rows: slice) -> torch.Tensor:
        """Compute the input of the next normalization, or the output; all rows are kept, or none."""
        pixels = self._pixels(rows)
        if self._done is not None and pixels.stop <= len(self._kept):
            return self._encoder.partial(self._kept[pixels], self._affines, self._done)
        return self._encoder.partial(self._read(rows) @ pointwise(self._encoder[0]), self._affines)


def pool(
    read: ReadRows, size: tuple[int, int], pooled: tuple[int, int], rows: slice, device: torch.device
) -> torch.Tensor:
    """Compute rows of the adaptive average pooling of a map.

    Args:
        read: reads pixels of the map.
        size: (height, width) of the map.
        pooled: (height, width) of the whole result, smaller or larger.
        rows: rows of the result to compute.
        device: device of the map.

    Returns:
        (rows, pooled width, 128).
    """
    (height, width), (bins, _) = size, pooled
    # Bins may overlap by one row.
    borders = [(i * height // bins, -(-(i + 1) * height // bins)) for i in range(rows.start, rows.stop)]
    span = slice(borders[0][0], borders[-1][1])
    if bins == height:
        output = read(span).unflatten(0, (-1, width))
    else:
        output = torch.zeros(len(borders), width, WIDTH, device=device)
        for part in chunks(span, width, device):
            x = read(part).unflatten(0, (-1, width))
            for sums, border in zip(output, borders):
                first, last = max(border[0], part.start), min(border[1], part.stop)
                if first < last:
                    sums += x[first - part.start : last - part.start].sum(0) / (border[1] - border[0])
    if pooled[1] == width:
        return output
    return F.adaptive_avg_pool2d(output.permute(2, 0, 1), (len(borders), pooled[1])).permute(1, 2, 0)


def encode_image(
    model: AnyUp, image: torch.Tensor, grid: tuple[int, int], kept_bytes: int
) -> tuple[BandedEncoder, torch.Tensor]:
    """Encode an image (3, H, W) float32.

    Returns:
        The encoder of the queries at the image's resolution, and the image's part (h * w, 128) of the keys.
    """
    device, (height, width) = image.device, image.shape[1:]
    pixels = image.flatten(1).T.contiguous()
    read_features, kept_bytes = _image_features(model.image_encoder, pixels, height, width, kept_bytes)
    waves = model.rope.waves(height, width)

    def read(rows: slice) -> torch.Tensor:
        x = read_features(rows).unflatten(0, (-1, width))
        return rotate(x, (waves[0][rows], waves[1][rows], *waves[2:])).flatten(0, 1)

    # One after the other, so that only one of them keeps rows.
    encoder = BandedEncoder(model.key_encoder, read, height, width, kept_bytes, device)
    keys = [pool(encoder, (height, width), grid, slice(row, row + 1), device) for row in range(grid[0])]
    del encoder
    encoder = BandedEncoder(model.query_encoder, read, height, width, kept_bytes, device)
    return encoder, torch.cat(keys).flatten(0, 1)


def _image_features(
    encoder: Encoder, pixels: torch.Tensor, height: int, width: int, kept_bytes: int
) -> tuple[ReadRows, int]:
    """Return a function that reads the image encoder's output, and the rest of the bytes to keep.

    The output depends only on the color of a pixel. Images have far fewer colors than pixels, except if they are tiny
    or were resized with floating-point colors.
    """
    device = pixels.device

    def rows_of(tensor: torch.Tensor, width: int) -> ReadRows:
        return lambda rows: tensor[rows.start * width : rows.stop * width]

    colors = _unique_colors(pixels, kept_bytes // 4 * 3 // _PIXEL_BYTES)
    if colors is None:
        # A row that the other encoders keep is never read again, which saves more than keeping this encoder's output.
        size = height * width * _PIXEL_BYTES
        size = size if 2 * size <= kept_bytes else 0
        return BandedEncoder(encoder, rows_of(pixels, width), height, width, size, device), kept_bytes - size
    values, index, counts = colors
    size = len(values) * _PIXEL_BYTES
    encoded = BandedEncoder(encoder, rows_of(values, 1), len(values), 1, size, device, counts)
    table, read_index = encoded(slice(0, len(values))), rows_of(index, width)
    return lambda rows: table.index_select(0, read_index(rows)), kept_bytes - size


def _unique_colors(pixels: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return colors (U, 3), the color index (P,) of each pixel, and the number of pixels (U,) of each color.

    None if there are more than ``most``, more than half as many as pixels, or on a GPU, which would have to wait.
    """
    if pixels.device.type != "cpu":
        return None
    bits = pixels.view(torch.int32).long()
    hashes = bits[:, 0] * _HASH[0] + bits[:, 1] * _HASH[1] + bits[:, 2] * _HASH[2]
    unique, index, counts = torch.unique(hashes, return_inverse=True, return_counts=True)
    if len(unique) > min(most, len(pixels) // 2):
        return None
    colors = pixels.new_empty(len(unique), 3).index_copy_(0, index, pixels)
    # Different colors with the same hash are improbable, but possible.
    same = torch.equal(colors.index_select(0, index), pixels)
    return (colors, index.int(), counts.to(pixels)) if same else None
