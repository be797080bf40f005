"""Transformer blocks as functions of their tokens, with compilation, precision and activation checkpointing applied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Additional inputs of a block.
Context = Sequence[Any]


@dataclass(frozen=True)
class BlockCall:
    """A block as a function of its tokens (B, N, C).

    Attributes:
        run: function of block, tokens and context that applies the block.
        block: the block, or its copy in another precision.
        context: additional inputs of the block.
        trained: whether gradients flow through the block.
        checkpointed: whether activation checkpointing is used.
        is_cast: whether the block is a copy that is used without autocast.
        dtype: dtype that the tokens are converted to; None to leave them unchanged.
    """

    run: Callable
    block: nn.Module
    context: Context
    trained: bool
    checkpointed: bool
    is_cast: bool
    dtype: torch.dtype | None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens if self.dtype is None else tokens.to(self.dtype)
        if self.is_cast:
            with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
                context = [part.to(self.dtype) if isinstance(part, torch.Tensor) else part for part in self.context]
                return self.run(self.block, tokens, *context)
        if self.checkpointed:
            return checkpoint(self.run, self.block, tokens, *self.context, use_reentrant=False)
        with contextlib.nullcontext() if self.trained else torch.no_grad():
            return self.run(self.block, tokens, *self.context)


def bind_blocks(
    blocks: Iterable[nn.Module],
    steps: Iterable[tuple[Callable, Context]],
    requires_grad: bool,
    wrap: Callable[[Callable, bool], Callable] | None,
    cast: Mapping[nn.Module, nn.Module],
    checkpointing: bool,
) -> list[BlockCall]:
    """Bind blocks to the functions that apply them.

    Args:
        blocks: blocks in order; those without a step are left out.
        steps: for each block, a function of block, tokens and additional inputs that applies it, and these inputs.
        requires_grad: whether the tokens before the first block require gradients.
        wrap: wraps a function, given whether its block is trained, for example to compile it; None to use it unchanged.
        cast: maps frozen blocks to copies in another precision, which are used instead.
        checkpointing: whether trained blocks use activation checkpointing.
    """
    calls, trained, was_cast = [], requires_grad, False
    for block, (step, context) in zip(blocks, steps):
        trained = torch.is_grad_enabled() and (trained or any(p.requires_grad for p in block.parameters()))
        run = wrap(step, trained) if wrap else step
        copy = None if trained else cast.get(block)
        used, is_cast = copy or block, copy is not None
        dtype = next(used.parameters()).dtype if is_cast or was_cast else None
        calls.append(BlockCall(run, used, context, trained, trained and checkpointing, is_cast, dtype))
        was_cast = is_cast
    return calls


def apply_blocks(calls: Iterable[BlockCall], tokens: torch.Tensor) -> torch.Tensor:
    """Apply blocks in turn to tokens (B, N, C)."""
    for call in calls:
        tokens = call(tokens)
    return tokens
