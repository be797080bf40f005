"""Transformer blocks over queries and patches, with rotary positions of the patches."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

# Frequencies of the rotary positions: lowest and highest, in periods over half of the longer image side.
_FREQUENCIES = (0.25, 4.0)


def rotations(grid: tuple[int, int], width: int, device: torch.device) -> torch.Tensor:
    """Compute rotary positions of the patches of a feature grid.

    Coordinates are relative to the center and scaled by the longer side, so that they cover -1..1 for any number of
    patches. They are plain arithmetic of the grid size, which may be symbolic.

    Args:
        grid: (h, w).
        width: channels d of an attention head, a multiple of 4.
        device: device of the result.

    Returns:
        (2, h * w, d / 2) float32: cosines and sines. The first half of the channels belongs to rows, the second to
        columns.
    """
    height, columns = grid
    longest = cast(int, torch.sym_max(height, columns))
    lowest, highest = _FREQUENCIES
    steps = torch.linspace(math.log(lowest), math.log(highest), width // 4, device=device).exp() * math.pi
    # (side, d / 4) for both axes
    rows, across = (
        ((2 * torch.arange(side, device=device) + 1 - side) / longest).unsqueeze(1) * steps
        for side in (height, columns)
    )
    angles = torch.cat([rows[:, None].expand(-1, columns, -1), across[None].expand(height, -1, -1)], dim=-1).flatten(
        0, 1
    )
    return torch.stack([angles.cos(), angles.sin()])


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
            rotation: (2, N, C / heads / 2), see :func:`rotations`.
            allowed: (B, Q, N) bool, patches that each query may attend to; None: all. Queries attend to all queries,
                and patches to everything.
        """
        # (B, Q + N, 3 C) -> three times (B, heads, Q + N, d)
        parts = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        queries = tokens.shape[1] - rotation.shape[1]
        query, key = (_rotated(part, rotation, queries) for part in (query, key))
        if allowed is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            # Only the queries' rows have a mask: the patches' attention stays fused and needs no mask of all pairs.
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


def _rotated(x: torch.Tensor, rotation: torch.Tensor, start: int) -> torch.Tensor:
    """Rotate the channels of all tokens of (B, heads, N, d) from ``start`` on."""
    cosines, sines = rotation.to(x.dtype)
    first, second = x[:, :, start:].chunk(2, dim=-1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return torch.cat([x[:, :, :start], turned], dim=2)
