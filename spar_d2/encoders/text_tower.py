"""The text side of a contrastive model, reduced to what segmentation needs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


class TextTower(nn.Module):
    """Tokenizer and text encoder of one model.

    Args:
        model: has ``encode_text(tokens) -> (n, D)``.
        tokenize: list of texts to (n, context_length) token numbers.
    """

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], torch.Tensor]) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenize = tokenize

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Encode texts to (n, D) float32, not normalised, on the device of the model."""
        device = next(self.model.parameters()).device
        batches = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        return torch.cat([self.model.encode_text(self.tokenize(batch).to(device)).float() for batch in batches])
