"""Runs the last blocks of an encoder on its tokens joined with queries, as in EoMT (arXiv:2503.19108)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.block_calls import Context, bind_blocks
from spar_d2.encoders.dinotxt import DINOtxtEncoder
from spar_d2.encoders.dinov3 import DINOv3Encoder
from spar_d2.encoders.timm_vit import TimmViTEncoder


class JoinedTokens(NamedTuple):
    """Queries (B, Q, C) and patches (B, N, C) after a block."""

    queries: torch.Tensor
    patches: torch.Tensor


def check_joined(encoder: DenseEncoder, blocks: int) -> None:
    """Raise ``ValueError`` if an encoder does not have as many blocks, or they do not take queries."""
    count = len(encoder.blocks)
    if not 1 <= blocks <= count:
        raise ValueError(f"MODEL.MASK_TRANSFORMER.ENCODER_BLOCKS must be in 0..{count}, got {blocks}")
    if isinstance(encoder, DINOtxtEncoder):
        name = type(encoder).__name__
        raise ValueError(f"MODEL.MASK_TRANSFORMER.ENCODER_BLOCKS must be 0 for {name}, whose blocks take no queries")


def run_joined(
    encoder: DenseEncoder, x: torch.Tensor, queries: torch.Tensor, blocks: int
) -> tuple[list[JoinedTokens], tuple[int, int]]:
    """Run the last blocks of an encoder with queries among the tokens.

    Queries come after the patches and have no position. Read-outs of the last block have no effect.

    Args:
        encoder: encoder; its precision and activation checkpointing apply, compilation does not apply to these blocks.
        x: images, see :meth:`DenseEncoder.forward`.
        queries: (Q, C), C the ``width`` of the encoder.
        blocks: number of blocks that the queries pass.

    Returns:
        Tokens before these blocks and after each of them, and the grid (h, w) of the patches.

    Raises:
        ValueError: as :func:`check_joined`.
    """
    check_joined(encoder, blocks)
    count, images = len(encoder.blocks), encoder._prepare(x)
    with encoder._autocast(images):
        tokens, grid, context = encoder._embed(images)
        for call in encoder._bind([(encoder._step, context)] * (count - blocks), tokens):
            tokens = call(tokens)
        prefix, patches = encoder.prefix_tokens, tokens.shape[1] - encoder.prefix_tokens
        tokens = torch.cat([tokens, queries.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=1)
        steps = [(encoder._step, _with_queries(encoder, context, len(queries)))] * blocks
        last = list(encoder.blocks)[-blocks:]
        # Gradients of the queries flow through frozen blocks, too, so that these have no copies in another precision.
        joined = [tokens]
        for call in bind_blocks(last, steps, torch.is_grad_enabled(), None, {}, encoder._checkpointing):
            joined.append(call(joined[-1]))
    end = prefix + patches
    return [JoinedTokens(part[:, end:].to(x.dtype), part[:, prefix:end].to(x.dtype)) for part in joined], grid


def _with_queries(encoder: DenseEncoder, context: Context, count: int) -> Context:
    """Append rotations by 0 for the queries to the additional inputs of the blocks."""
    if not context:
        return ()
    if isinstance(encoder, DINOv3Encoder):
        # (N, 1, 1, d) and (N, 1, 1, d / 2)
        cos, sin = context
        rows = (0, 0, 0, 0, 0, 0, 0, count)
        return F.pad(cos, rows, value=1.0), F.pad(sin, rows)
    if isinstance(encoder, TimmViTEncoder):
        # (N, 2 d), sines before cosines.
        sin, cos = context[0].chunk(2, dim=-1)
        rows = (0, 0, 0, count)
        return (torch.cat([F.pad(sin, rows), F.pad(cos, rows, value=1.0)], dim=-1),)
    return context
