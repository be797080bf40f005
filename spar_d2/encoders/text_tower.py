"""The text side of a contrastive model, reduced to what segmentation needs of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spar_d2.encoders.precision import full_float32


class TextTower(nn.Module):
    """Tokenizer and text encoder of one model.

    Args:
        model: has ``encode_text(tokens) -> (n, D)``.
        tokenize: list of texts to (n, context_length) token numbers.
    """

    model: Any

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], torch.Tensor]) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenize = tokenize

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Encode texts to (n, D) float32, not normalized, on the device of the model.

        It computes in float32 also within ``torch.autocast``: vectors are kept on disk for others.
        """
        device = next(self.model.parameters()).device
        vectors = []
        # Hidden where it is over in a moment.
        bar = tqdm(total=len(texts), desc="encoding words", unit="text", disable=None, leave=False, delay=2)
        with full_float32(device), bar:
            for start in range(0, len(texts), batch_size):
                batch = list(texts[start : start + batch_size])
                vectors.append(self.model.encode_text(self.tokenize(batch).to(device)).float())
                bar.update(len(batch))
        return torch.cat(vectors)

    @functools.cached_property
    def _context_length(self) -> int:
        return self.tokenize([""]).shape[1]

    def reads_all(self, text: str) -> bool:
        """Whether the encoder sees a text to its end; what is beyond the context length it does not."""
        # No token is shorter than a byte, and up to two are added.
        if len(text.encode()) <= self._context_length - 2:
            return True
        tokens = self.tokenize([text, text[:-1]])
        return not torch.equal(tokens[0], tokens[1])
