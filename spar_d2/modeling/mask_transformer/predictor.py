"""Masks from queries and patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import nn

# Masks are predicted with at least this stride in pixels, unless patches are smaller.
_MASK_STRIDE = 4


@dataclass(frozen=True)
class Prediction:
    """Prediction of all queries, after some of the blocks.

    Attributes:
        embeddings: (B, Q, C) normalized query embeddings, for the classifier.
        masks: (B, Q, h * s, w * s) mask logits, for s x s cells in each patch.
    """

    embeddings: torch.Tensor
    masks: torch.Tensor


class MaskPredictor(nn.Module):
    """Compares embedded queries with upsampled patches.

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
        steps = max(0, math.floor(math.log2(patch_size / _MASK_STRIDE) + 0.5))
        self.cells = 2**steps
        self.upsampling = nn.Sequential(*(_doubling(width) for _ in range(steps)))

    def forward(self, tokens: torch.Tensor, count: int, grid: tuple[int, int], fine: bool) -> Prediction:
        """Predict masks.

        Args:
            tokens: (B, Q + N, C), queries and then patches.
            count: number of queries Q.
            grid: (h, w) of the patches.
            fine: upsample patches by learned layers; otherwise, masks are upsampled bilinearly, which is cheaper.
        """
        tokens = self.norm(tokens)
        embeddings = tokens[:, :count]
        pixels = tokens[:, count:].transpose(1, 2).unflatten(2, grid)
        pixels = self.upsampling(pixels) if fine else pixels
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embedding(embeddings), pixels)
        if not fine and self.cells > 1:
            masks = F.interpolate(masks, scale_factor=self.cells, mode="bilinear", align_corners=False)
        return Prediction(embeddings, masks)


def _doubling(width: int) -> nn.Module:
    """Double the resolution of a feature map."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
        LayerNorm2d(width),
    )
