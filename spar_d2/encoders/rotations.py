"""Rotary position embeddings of timm for grids without a known size."""

from __future__ import annotations

import math
from typing import Any

import torch


def symbolic_rotations(rope: Any, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Compute the sines and cosines of ``rope.get_embed(grid)``, by arithmetic that ``torch.export`` can record.

    Args:
        rope: ``RotaryEmbeddingCat`` or ``RotaryEmbeddingDinoV3`` of timm.
        grid: number of patches (h, w).
        device: device of the result.

    Returns:
        (h * w, 2 * d) float32.
    """
    periods = getattr(rope, "periods", None)
    if periods is None:
        # RotaryEmbeddingCat
        kind, reference, frequencies = rope.grid_type, rope.ref_feat_shape or (None, None), rope.bands
    else:
        kind, reference, frequencies = "centered", (None, None), 2 * math.pi / periods
    normalize = getattr(rope, "normalize_coords", "separate")
    sides = [torch.full((), side, dtype=torch.float32, device=device) for side in grid]
    common = {"min": torch.minimum, "max": torch.maximum}
    lengths = [common[normalize](*sides)] * 2 if normalize in common else sides
    axes = [
        _coordinates(kind, size, side, length, rope.grid_offset) for size, side, length in zip(grid, sides, lengths)
    ]
    axes = [axis if r is None else axis / side * r for axis, side, r in zip(axes, sides, reference)]
    if kind == "centered":
        axes = [2 * axis - 1 for axis in axes]
    rows, columns = axes[0][:, None].expand(*grid), axes[1][None].expand(*grid)
    both = (columns, rows) if rope.grid_indexing == "xy" else (rows, columns)
    # (h, w, 2, d / 4) -> (h * w, d / 2)
    angles = (torch.stack(both, dim=-1)[..., None] * frequencies.float().to(device)).flatten(2).flatten(0, 1)
    parts = (
        torch.cat([part, part], dim=-1) if rope.rotate_half else torch.stack([part, part], dim=-1).flatten(1)
        for part in (angles.sin(), angles.cos())
    )
    return torch.cat(list(parts), dim=-1)


def _coordinates(kind: str, size: int, side: torch.Tensor, length: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the coordinates of the patches along an axis of ``size`` patches, which is ``side`` as a tensor."""
    steps = torch.arange(size, dtype=torch.float32, device=side.device)
    if kind == "pixel":
        # From -1 to 1; a single patch is at -1.
        return 2 * steps / (side - 1).clamp(min=1) - 1
    if kind == "centered":
        return (steps + 0.5 + offset) / length
    return steps + offset
