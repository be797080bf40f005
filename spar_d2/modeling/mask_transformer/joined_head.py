"""Mask head whose queries pass the last blocks of the encoder itself."""

from __future__ import annotations

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.joined_queries import JoinedTokens, run_joined
from spar_d2.modeling.mask_transformer.blocks import spread_places
from spar_d2.modeling.mask_transformer.predictor import FIT_ADVICE, MaskPredictor, Prediction


class JoinedHead(nn.Module):
    """Learned queries among the tokens of the last blocks of an encoder, without blocks of their own (EoMT).

    Attention is not masked, because the blocks of encoders take no masks. The encoder must be trained in these blocks,
    which do not know queries.

    Args:
        encoder_width: channels of the encoder's tokens.
        patch_size: side of a patch in pixels.
        queries: number of queries Q.
        width: channels C of the predicted embeddings and of the patches that masks are made of.
        blocks: number of the encoder's blocks that the queries pass.

    Raises:
        ValueError: an argument has an invalid value.
    """

    fit_advice = FIT_ADVICE

    def __init__(self, encoder_width: int, patch_size: int, queries: int, width: int, blocks: int) -> None:
        super().__init__()
        for name, value in (("QUERIES", queries), ("WIDTH", width)):
            if value < 1:
                raise ValueError(f"MODEL.MASK_TRANSFORMER.{name} must be at least 1, got {value}")
        self.encoder_blocks = blocks
        self.queries = nn.Parameter(torch.randn(queries, encoder_width) * 0.02)
        # Places of the queries, spread over the image at the start; only for their masks.
        self.places = nn.Parameter(spread_places(queries))
        self.projection = nn.Sequential(nn.LayerNorm(encoder_width), nn.Linear(encoder_width, width))
        self.predictor = MaskPredictor(width, patch_size)

    def forward(self, encoder: DenseEncoder, x: torch.Tensor) -> list[Prediction]:
        """Predict masks of images, see :meth:`DenseEncoder.forward`.

        Returns:
            Predictions before the first of the blocks and after each of them in training, and the last one otherwise.
        """
        joined, grid = run_joined(encoder, x, self.queries, self.encoder_blocks)
        stages = joined if self.training else joined[-1:]
        return [self._predict(tokens, grid, tokens is stages[-1]) for tokens in stages]

    def _predict(self, tokens: JoinedTokens, grid: tuple[int, int], last: bool) -> Prediction:
        return self.predictor(self.projection(torch.cat(tokens, dim=1)), self.places[None], grid, last)
