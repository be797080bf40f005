"""Keeps the outputs of the frozen blocks of an encoder in memory during training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from spar_d2.utils.content_cache import digest


class FrozenOutputs:
    """Cache of the tokens after the frozen blocks at the start of an encoder, see :attr:`DenseEncoder.frozen_outputs`.

    Tokens are stored on the CPU, under a hash of the pixels. When the memory is full, no more images are added, so that
    the cache is also useful if it holds only some of the images. On a GPU, hashing waits for the device.

    Args:
        gib: maximum memory in GiB, greater than 0.

    Attributes:
        hits, misses: numbers of cached and of computed images.

    Raises:
        ValueError: ``gib`` is invalid.
    """

    def __init__(self, gib: float) -> None:
        if not 0 < gib < math.inf:
            raise ValueError(f"gib (SPAR.DISTILL.FROZEN_OUTPUTS_GIB) must be greater than 0, got {gib}")
        self._free = int(gib * 2**30)
        self._tokens: dict[str, torch.Tensor] = {}
        self.hits = self.misses = 0

    def __call__(self, images: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tokens (B, N, C) of images (B, 3, H, W), computed by ``compute`` unless all are cached."""
        keys = [digest(str(image.shape), image) for image in images]
        if all(key in self._tokens for key in keys):
            self.hits += len(keys)
            return torch.stack([self._tokens[key] for key in keys]).to(images.device, non_blocking=True)
        self.misses += len(keys)
        tokens = compute()
        for key, one in zip(keys, tokens):
            size = one.numel() * one.element_size()
            if key not in self._tokens and size <= self._free:
                self._tokens[key] = one.detach().to("cpu", copy=True)
                self._free -= size
        return tokens
