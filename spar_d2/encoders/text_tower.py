"""Text tower of a contrastive vision-language model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spar_d2.encoders.precision import full_float32


class TextTower(nn.Module):
    """Tokenizer and text encoder of a model.

    Args:
        model: module with a method ``encode_text(tokens) -> (n, D)``.
        tokenize: function that converts n texts to token ids (n, context_length).
    """

    model: Any

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], torch.Tensor]) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenize = tokenize

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Encode texts to unnormalized text embeddings (n, D), float32, on the device of the model.

        Embeddings are always computed in float32, even within ``torch.autocast``, because they are cached on disk.
        """
        device = next(self.model.parameters()).device
        embeddings = []
        # The delay hides the progress bar for small vocabularies.
        bar = tqdm(total=len(texts), desc="encoding prompts", unit="text", disable=None, leave=False, delay=2)
        with full_float32(device), bar:
            for start in range(0, len(texts), batch_size):
                batch = list(texts[start : start + batch_size])
                embeddings.append(self.model.encode_text(self.tokenize(batch).to(device)).float())
                bar.update(len(batch))
        return torch.cat(embeddings)

    @functools.cached_property
    def _context_length(self) -> int:
        return self.tokenize([""]).shape[1]

    def reads_all(self, text: str) -> bool:
        """Return whether a text fits into the context length without truncation."""
        # Each token covers at least one byte, and up to two special tokens are added.
        if len(text.encode()) <= self._context_length - 2:
            return True
        tokens = self.tokenize([text, text[:-1]])
        return not torch.equal(tokens[0], tokens[1])
