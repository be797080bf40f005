"""Transformer blocks over queries and patches, with rotary positions of the patches."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

# Frequencies of the rotary positions: lowest and highest, in periods over half of the longer image side.
_FREQUENCIES = (0.25, 12.0)


def axis_places(grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places (h,) of rows and (w,) of columns: 0 in the center and -1..1 along the longer side.

    They are plain arithmetic of the grid size, which may be symbolic.
    """
    longest = cast(int, torch.sym_max(*grid))
    y, x = ((2 * torch.arange(side, device=device) + 1 - side) / longest for side in grid)
    return y, x


def grid_places(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return the places (h * w, 2) of patches, rows and columns, see :func:`axis_places`."""
    height, width = grid
    y, x = axis_places(grid, device)
    return torch.stack([y[:, None].expand(-1, width), x[None].expand(height, -1)], dim=-1).flatten(0, 1)


def spread_places(count: int) -> torch.Tensor:
    """Return places (count, 2) that are spread evenly over a square image."""
    # Sobol's sequence cannot give 0 points.
    return 2 * torch.quasirandom.SobolEngine(2).draw(count + 1)[:count] - 1


def _angles(places: torch.Tensor, count: int) -> torch.Tensor:
    """Return angles (..., 2 * count) of places (..., 2): of rows, then columns, at frequencies in geometric steps."""
    lowest, highest = _FREQUENCIES
    steps = torch.linspace(math.log(lowest), math.log(highest), count, device=places.device).exp() * math.pi
    return (places[..., None] * steps).flatten(-2)


def rotations(places: torch.Tensor, width: int) -> torch.Tensor:
    """Compute rotary positions.

    Args:
        places: (..., N, 2), see :func:`grid_places`.
        width: channels d of an attention head, a multiple of 4.

    Returns:
        (2, ..., N, d / 2): cosines and sines. The first half of the channels belongs to rows, the second to columns.
    """
    angles = _angles(places, width // 4)
    return torch.stack([angles.cos(), angles.sin()])


class PlaceEmbedding(nn.Module):
    """Embeds places by a linear layer on their sines and cosines.

    Args:
        width: number of channels C, a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.count = width // 4
        self.projection = nn.Linear(4 * self.count, width)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """Embed places (..., 2) to (..., C)."""
        angles = _angles(places, self.count)
        return self.projection(torch.cat([angles.cos(), angles.sin()], dim=-1))


class QueryBlock(nn.Module):
    """Pre-norm transformer block in which queries and patches attend to each other.

    Args:
        width: number of channels C.
        heads: number of attention heads; C must be a multiple of 4 times this number.
        ratio: width of the hidden layer of the MLP, relative to C.
    """

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, tokens: torch.Tensor, rotation: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            tokens: (B, Q + N, C), Q queries and then N patches.
            rotation: (2, Q + N, C / heads / 2), see :func:`rotations`; or (2, B, 1, Q + N, C / heads / 2) if places
                differ between images.
            allowed: (B, Q, N) bool, patches that each query may attend to; None: all. Queries attend to all queries,
                and patches to everything.
        """
        # (B, Q + N, 3 C) -> three times (B, heads, Q + N, d)
        parts = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        query, key = (_rotated(part, rotation) for part in (query, key))
        if allowed is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            # Only the queries' rows have a mask: the patches' attention stays fused and needs no mask of all pairs.
            queries = allowed.shape[1]
            mask = torch.cat([allowed.new_ones(*allowed.shape[:2], queries), allowed], dim=2)[:, None]
            mixed = torch.cat(
                [
                    F.scaled_dot_product_attention(query[:, :, :queries], key, value, attn_mask=mask),
                    F.scaled_dot_product_attention(query[:, :, queries:], key, value),
                ],
                dim=2,
            )
        tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate the channels of tokens (B, heads, N, d)."""
    cosines, sines = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
