"""Masks from queries and patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import nn

from spar_d2.modeling.mask_transformer.blocks import axis_places

# Masks are predicted with at least this stride in pixels, unless patches are smaller.
_MASK_STRIDE = 4
# Unit of length of the terms of :class:`MaskExtent`, relative to half of the longer image side, and the input of
# softplus for its square terms at the start.
_UNIT, _SQUARE = 0.25, -2.0
# End of the error message for weights of a head with other settings.
FIT_ADVICE = "Use the values of MODEL.MASK_TRANSFORMER that it was trained with; its config.yaml has them"


@dataclass(frozen=True)
class Prediction:
    """Prediction of all queries, after some of the blocks.

    Attributes:
        embeddings: (B, Q, C) normalized query embeddings, for the classifier.
        masks: (B, Q, h * s, w * s) mask logits, for s x s cells in each patch.
        centers: (B, h, w) logits of the centers of things, in the first prediction of a head that finds centers.
    """

    embeddings: torch.Tensor
    masks: torch.Tensor
    centers: torch.Tensor | None = None


class MaskExtent(nn.Module):
    """Mask logits that depend only on the position relative to the place of a query: a quadratic function.

    Segments of things are local, and products of features learn this slowly. Relative coordinates are the idea of
    CondInst (arXiv:2003.05664). The square terms are never positive, so that a mask can only decrease far away.

    Args:
        width: channels C of the queries.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # Linear terms and square terms, each for rows and columns.
        self.terms = nn.Linear(width, 4)
        nn.init.zeros_(self.terms.weight)
        with torch.no_grad():
            self.terms.bias.copy_(torch.tensor([0.0, 0.0, _SQUARE, _SQUARE]))

    def forward(self, embeddings: torch.Tensor, places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Compute logits.

        Args:
            embeddings: (B, Q, C) query embeddings.
            places: (B or 1, Q, 2) places of the queries, see :func:`grid_places`.
            size: (h, w) of the masks.

        Returns:
            (B, Q, h, w).
        """
        slopes, squares = self.terms(embeddings).chunk(2, dim=-1)
        squares = -F.softplus(squares)
        parts = []
        for axis, cells in enumerate(axis_places(size, places.device)):
            # (B or 1, Q, cells)
            offsets = (cells - places[..., axis, None]) / _UNIT
            parts.append((slopes[..., axis, None] + squares[..., axis, None] * offsets) * offsets)
        return parts[0][..., None] + parts[1][:, :, None]


class MaskPredictor(nn.Module):
    """Compares embedded queries with upsampled patches, see also :class:`MaskExtent`.

    Args:
        width: channels C of queries and patches.
        patch_size: side of a patch in pixels.

    Attributes:
        cells: number of mask cells along each side of a patch.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mask_embedding = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.extent = MaskExtent(width)
        steps = max(0, math.floor(math.log2(patch_size / _MASK_STRIDE) + 0.5))
        self.cells = 2**steps
        self.upsampling = nn.Sequential(*(_doubling(width) for _ in range(steps)))

    def forward(self, tokens: torch.Tensor, places: torch.Tensor, grid: tuple[int, int], fine: bool) -> Prediction:
        """Predict masks.

        Args:
            tokens: (B, Q + N, C), queries and then patches.
            places: (B or 1, Q, 2) places of the queries.
            grid: (h, w) of the patches.
            fine: upsample patches by learned layers; otherwise, masks are upsampled bilinearly, which is cheaper.
        """
        tokens, count = self.norm(tokens), places.shape[1]
        embeddings = tokens[:, :count]
        pixels = tokens[:, count:].transpose(1, 2).unflatten(2, grid)
        pixels = self.upsampling(pixels) if fine else pixels
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embedding(embeddings), pixels)
        if not fine and self.cells > 1:
            masks = F.interpolate(masks, scale_factor=self.cells, mode="bilinear", align_corners=False)
        size = grid[0] * self.cells, grid[1] * self.cells
        return Prediction(embeddings, masks + self.extent(embeddings, places, size))


def _doubling(width: int) -> nn.Module:
    """Double the resolution of a feature map."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
        LayerNorm2d(width),
    )
