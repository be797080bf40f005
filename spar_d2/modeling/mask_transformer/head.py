"""Mask head: light transformer blocks over queries and patch features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from spar_d2.modeling.mask_transformer.blocks import (
    PlaceEmbedding,
    QueryBlock,
    grid_places,
    rotations,
    spread_places,
)
from spar_d2.modeling.mask_transformer.centers import CenterQueries
from spar_d2.modeling.mask_transformer.predictor import FIT_ADVICE, MaskPredictor, Prediction


class MaskTransformerHead(nn.Module):
    """Queries and patch features, which exchange information in a few blocks and then give masks.

    It follows the idea of encoder-only mask transformers (EoMT, arXiv:2503.19108) with light blocks after a frozen ViT:
    there is neither a pyramid nor a pixel decoder. Intermediate features of the encoder are added before the blocks.
    Positions of patches are rotary, so that images have any size.

    Args:
        widths: channels of the encoder's feature maps, in the order of :meth:`forward`.
        patch_size: side of a patch in pixels.
        queries: number of queries Q.
        width: channels C of queries and patches.
        blocks: number of blocks, at least 1.
        heads: attention heads of a block.
        checkpointing: use activation checkpointing in training.
        center_share: share of the queries, in 0..1, that start from patches, see :class:`CenterQueries`; the others are
            learned.
        test_centers: number of queries from patches in inference; 0 for that of the training.

    Raises:
        ValueError: an argument has an invalid value.
    """

    fit_advice = FIT_ADVICE

    def __init__(
        self,
        widths: Sequence[int],
        patch_size: int,
        queries: int = 200,
        width: int = 256,
        blocks: int = 4,
        heads: int = 8,
        checkpointing: bool = False,
        center_share: float = 0.0,
        test_centers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("QUERIES", queries), ("BLOCKS", blocks), ("HEADS", heads)):
            if value < 1:
                raise ValueError(f"MODEL.MASK_TRANSFORMER.{name} must be at least 1, got {value}")
        if not 0 <= center_share <= 1:
            raise ValueError(f"MODEL.MASK_TRANSFORMER.CENTER_SHARE must be in 0..1, got {center_share}")
        at_centers = round(center_share * queries)
        if test_centers < 0 or (test_centers and not at_centers):
            raise ValueError(
                "MODEL.MASK_TRANSFORMER.TEST_CENTERS must be at least 0, and 0 if CENTER_SHARE is 0; "
                f"got {test_centers} and {center_share}"
            )
        if blocks < len(widths) - 1:
            raise ValueError(
                f"MODEL.MASK_TRANSFORMER.BLOCKS must be at least {len(widths) - 1}, the number of LATERAL_BLOCKS; "
                f"got {blocks}"
            )
        if width < 1 or width % (4 * heads):
            raise ValueError(
                f"MODEL.MASK_TRANSFORMER.WIDTH must be a multiple of {4 * heads}, four times HEADS; got {width}"
            )
        self.checkpointing = checkpointing
        self._head_width = width // heads
        learned = queries - at_centers
        self.queries = nn.Parameter(torch.randn(learned, width) * 0.02)
        # Places of the learned queries, spread over the image at the start.
        self.places = nn.Parameter(spread_places(learned))
        self.centers = CenterQueries(width, at_centers, test_centers) if at_centers else None
        self.place_embedding = PlaceEmbedding(width)
        # A norm and a projection for each feature map of the encoder.
        self.laterals = nn.ModuleList(nn.Sequential(LayerNorm2d(c), nn.Conv2d(c, width, 1)) for c in widths)
        self.blocks = nn.ModuleList(QueryBlock(width, heads) for _ in range(blocks))
        self.predictor = MaskPredictor(width, patch_size)

    def forward(self, features: Sequence[torch.Tensor], masked: Sequence[bool] = ()) -> list[Prediction]:
        """Predict masks.

        Args:
            features: feature maps (B, c, h, w) of the encoder. The last one is the input of the blocks; others are
                added before the first, second, ... block; there are at most as many as blocks.
            masked: for each block, whether queries attend only to the patches of the mask that they predict before it;
                ignored in inference.

        Returns:
            Predictions before the first block and after each block in training, and the last one otherwise.
        """
        *lower, dense = (lateral(x) for lateral, x in zip(self.laterals, features))
        grid = (dense.shape[2], dense.shape[3])
        tokens, places, everywhere, centers = self._tokens(dense, lower)
        count, rotation = places.shape[1], rotations(everywhere, self._head_width)[:, :, None]
        predictions = []
        if self.training:
            predictions.append(replace(self.predictor(tokens, places, grid, False), centers=centers))
        for number, block in enumerate(self.blocks):
            if number < len(lower):
                tokens = torch.cat([tokens[:, :count], tokens[:, count:] + lower[number].flatten(2).transpose(1, 2)], 1)
            allowed = (
                self._allowed(predictions[-1].masks) if self.training and any(masked[number : number + 1]) else None
            )
            if self.checkpointing and self.training:
                tokens = checkpoint(block, tokens, rotation, allowed, use_reentrant=False)
            else:
                tokens = block(tokens, rotation, allowed)
            last = number == len(self.blocks) - 1
            if self.training or last:
                predictions.append(self.predictor(tokens, places, grid, last))
        return predictions

    def _tokens(
        self, dense: torch.Tensor, lower: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the tokens (B, Q + N, C) of queries and then patches (B, C, h, w), before the first block.

        Also returns the places of the queries (B or 1, Q, 2), those of all tokens, and logits of centers, if any.
        """
        batch, centers = dense.shape[0], None
        queries, places = self.queries.expand(batch, -1, -1).to(dense.dtype), self.places[None]
        if self.centers is not None:
            centers, found, found_places = self.centers(sum(lower, dense))
            queries = torch.cat([queries, found.to(dense.dtype)], dim=1)
            places = torch.cat([places.expand(batch, -1, -1), found_places], dim=1)
        tokens = torch.cat([queries, dense.flatten(2).transpose(1, 2)], dim=1)
        grid = grid_places((dense.shape[2], dense.shape[3]), dense.device)
        everywhere = torch.cat([places, grid.expand(places.shape[0], -1, -1)], dim=1)
        return tokens + self.place_embedding(everywhere), places, everywhere, centers

    def _allowed(self, masks: torch.Tensor) -> torch.Tensor:
        """Return the patches (B, Q, N) bool inside of each mask; all of them for masks that are empty."""
        inside = F.avg_pool2d(masks.detach().float(), self.predictor.cells).flatten(2) > 0
        return inside | ~inside.any(2, keepdim=True)
