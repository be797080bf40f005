"""Layers of AnyUp. Maps are matrices with one row for each pixel and one column for each channel.

Pointwise layers are matrix products in this layout, and can be applied to any set of pixels. Only group normalization
needs the whole map: its statistics are collected first (:class:`Moments`), then applied as a scale and a shift.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 128
HEADS = 4
# Smallest norm to divide by, as in torch.nn.functional.normalize.
SHORTEST = 1e-12
_GROUPS = 8
_FILTER = 5
# Elements of a chunk of filter responses.
_RESPONSES = {"cpu": 1 << 19, "other": 1 << 24}
# Machine epsilon of float32.
_RMS_EPS = torch.finfo(torch.float32).eps


class Affine(NamedTuple):
    """Scale and shift (channels,) float32 that a group normalization amounts to."""

    scale: torch.Tensor
    shift: torch.Tensor


class Moments:
    """Mean and variance of the channels of a map, collected from parts of the map."""

    def __init__(self) -> None:
        self._count = 0.0
        self._mean = self._squares = torch.zeros(())

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
        """Add pixels (P, channels) float32, each of which counts ``weights`` (P,) times, default once."""
        count = len(x) if weights is None else float(weights.sum())
        mean = x.mean(0) if weights is None else weights @ x / count
        # Squared distances from the mean: differences of squares would cancel if the mean is large.
        squares = (x - mean).square_()
        total = self._count + count
        difference = mean.double() - self._mean
        spread = (squares.sum(0) if weights is None else weights @ squares).double()
        self._squares = self._squares + spread + difference**2 * (self._count * count / total)
        self._mean = self._mean + difference * (count / total)
        self._count = total
        return self

    def affine(self, norm: nn.GroupNorm) -> Affine:
        """Return the scale and shift of a group normalization of the whole map."""
        means, variances = (m.view(norm.num_groups, -1) for m in (self._mean, self._squares / self._count))
        mean = means.mean(1, keepdim=True)
        variance = (variances + (means - mean) ** 2).mean(1, keepdim=True)
        scale = (norm.weight.double().view_as(means) * (variance + norm.eps).rsqrt()).flatten()
        shift = norm.bias.double() - mean.expand_as(means).flatten() * scale
        return Affine(scale.float(), shift.float())


class Block(nn.Module):
    """Residual block: two times normalization, SiLU and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.GroupNorm(_GROUPS, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 1, bias=False)) for _ in range(2)]
        self.block = nn.Sequential(*layers[0], *layers[1])

    @property
    def norms(self) -> tuple[nn.GroupNorm, nn.GroupNorm]:
        """The two normalizations."""
        return cast(nn.GroupNorm, self.block[0]), cast(nn.GroupNorm, self.block[3])

    def hidden(self, x: torch.Tensor, affine: Affine) -> torch.Tensor:
        """Compute the input (P, 128) of the second normalization."""
        return _activated(x, affine) @ pointwise(self.block[2])

    def output(self, x: torch.Tensor, hidden: torch.Tensor, affine: Affine) -> torch.Tensor:
        """Compute the output (P, 128)."""
        return torch.addmm(x, _activated(hidden, affine), pointwise(self.block[5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to all pixels (P, 128) of a map."""
        first, second = self.norms
        hidden = self.hidden(x, Moments().add(x).affine(first))
        return self.output(x, hidden, Moments().add(hidden).affine(second))


class Encoder(nn.Sequential):
    """A first layer, and two blocks."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first, Block(), Block())

    @property
    def blocks(self) -> list[Block]:
        """The two blocks."""
        return [cast(Block, self[1]), cast(Block, self[2])]

    @property
    def norms(self) -> list[nn.GroupNorm]:
        """The four normalizations, in order."""
        return [norm for block in self.blocks for norm in block.norms]

    def apply_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the blocks to the first layer's output (P, 128) of a whole map."""
        return self[2](self[1](x))

    def partial(self, x: torch.Tensor, affines: list[Affine], done: int = 0) -> torch.Tensor:
        """Compute the input (P, 128) of the next normalization, or the output after the last one.

        Args:
            x: input (P, 128) of block ``done``.
            affines: the normalizations whose statistics are known, 0 to 4.
            done: number of blocks that are already applied to ``x``.
        """
        for number, block in list(enumerate(self.blocks))[done:]:
            known = affines[2 * number : 2 * number + 2]
            if not known:
                break
            hidden = block.hidden(x, known[0])
            if len(known) == 1:
                return hidden
            x = block.output(x, hidden, known[1])
        return x


class FeatureFilters(nn.Module):
    """Filters that are applied to each channel of the features, so that the number of channels is free."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(WIDTH, 1, _FILTER, _FILTER) / _FILTER)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Summarize the features (C, h, w) of each grid cell as (h * w, 128) numbers that sum to 1."""
        channels, height, width = features.shape
        border = _FILTER // 2
        unit = F.normalize(features, dim=0, eps=SHORTEST)[None]
        inside = F.conv2d(F.pad(torch.ones_like(unit[:, :1]), [border] * 4), torch.ones_like(self.basis[:1]))[0, 0]
        padded = F.pad(unit, [border] * 4)
        filters = self.basis.float().flatten(1).T
        responses = _RESPONSES.get(features.device.type, _RESPONSES["other"])
        cells_at_once = max(1, responses // (channels * WIDTH))
        output = []
        for row in range(height):
            # (1, C * 25, w) -> (w, C, 25)
            patches = F.unfold(padded[:, :, row : row + _FILTER], _FILTER)[0].unflatten(0, (channels, -1)).movedim(2, 0)
            for part, taps in zip(patches.split(cells_at_once), inside[row].split(cells_at_once)):
                responses = (part / taps[:, None, None]) @ filters
                # The published weights were trained with this order: the C x 128 responses of a cell are read as 128
                # rows of C numbers, without a transposition.
                output.append(responses.view(-1, WIDTH, channels).softmax(1).mean(2))
        return torch.cat(output)


class RotaryPositions(nn.Module):
    """Frequencies of the rotary position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.randn(2, WIDTH))

    def waves(self, height: int, width: int) -> tuple[torch.Tensor, ...]:
        """Return cosines and sines of the rows (height, 128), then of the columns (width, 128)."""
        sides = zip((height, width), self.freqs.float())
        angles = [torch.linspace(0, 1, side, device=freqs.device)[:, None] * freqs for side, freqs in sides]
        return tuple(wave for angle in angles for wave in (angle.cos(), angle.sin()))


def rotate(x: torch.Tensor, waves: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Apply the position embedding to rows (R, W, 128) of a map."""
    row_cos, row_sin, column_cos, column_sin = waves
    row_cos, row_sin = row_cos[:, None], row_sin[:, None]
    # The angle is the sum of the row's and the column's. Sines and cosines of all pixels would take longer.
    cos = torch.addcmul(row_cos * column_cos, row_sin, column_sin, value=-1)
    sin = torch.addcmul(row_sin * column_cos, row_cos, column_sin)
    half = WIDTH // 2
    first, second = x[..., :half], x[..., half:]
    output = x * cos
    output[..., :half].addcmul_(second, sin[..., :half], value=-1)
    output[..., half:].addcmul_(first, sin[..., half:])
    return output


class RMSGain(nn.Module):
    """Root mean square normalization with a gain. PyTorch has it from version 2.4 on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize pixels (P, 128)."""
        return x * (x.square().mean(1, keepdim=True) + _RMS_EPS).rsqrt() * self.weight.float()


class CrossAttention(nn.Module):
    """Parameters of the attention; its value and output projections are unused."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_q = RMSGain()
        self.norm_k = RMSGain()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def project(self, x: torch.Tensor, norm: RMSGain, third: int) -> torch.Tensor:
        """Normalize pixels (P, 128), and project them with a third of the input projection to (P, 128)."""
        rows = slice(third * WIDTH, (third + 1) * WIDTH)
        weight, bias = self.attention.in_proj_weight.float()[rows], self.attention.in_proj_bias.float()[rows]
        return torch.addmm(bias, norm(x), weight.T)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Project pixels (P, 128) to queries (P, 128), scaled for the softmax."""
        return self.project(x, self.norm_q, 0).mul_((WIDTH // HEADS) ** -0.5)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Project grid cells (P, 128) to keys (P, 128)."""
        return self.project(x, self.norm_k, 1)


class CrossDecode(nn.Module):
    """Parameters from pooled queries to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = CrossAttention()
        self.conv2d = nn.Conv2d(WIDTH, WIDTH, 3, bias=False)


def pointwise(layer: nn.Module) -> torch.Tensor:
    """Return the weights of a pointwise convolution as a matrix (inputs, outputs)."""
    return cast(torch.Tensor, layer.weight).float().flatten(1).T


def convolve(padded: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Apply a 3x3 convolution without bias to a padded map (R + 2, W + 2, inputs); returns (R, W, 128)."""
    height, width, _ = padded.shape
    # (3, 3, inputs, outputs)
    taps = cast(torch.Tensor, layer.weight).float().permute(2, 3, 1, 0)
    pixels = padded.flatten(0, 1)
    # Pixels of a tap are contiguous if the padding columns are computed, too. Their values are dropped.
    count = (height - 2) * width - 2
    output = padded.new_empty((height - 2) * width, WIDTH)
    for y in range(3):
        for x in range(3):
            start = y * width + x
            # With beta = 0, the values before are ignored.
            output[:count].addmm_(pixels[start : start + count], taps[y, x], beta=float(y + x > 0))
    return output.unflatten(0, (-1, width))[:, : width - 2]


def _activated(x: torch.Tensor, affine: Affine) -> torch.Tensor:
    return F.silu(torch.addcmul(affine.shift, x, affine.scale), inplace=True)
