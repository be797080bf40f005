"""Read-outs of timm's ViTs that replace the attention of the last block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import nn

from spar_d2.encoders.self_correlation import SELF_CORRELATION, attend_to_similar

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def check_last_block(block: nn.Module, readout: str) -> None:
    """Raise ``ValueError`` if a read-out ("value" or "self_correlation") does not support the block."""
    attn = cast(Any, getattr(block, "attn", None))
    known = type(block) in (Block, EvaBlock, EvaBlockPostNorm) and getattr(attn, "gate", None) is None
    qkv = getattr(attn, "qkv", None)
    fused = qkv is not None and qkv.out_features == 3 * cast(Any, attn).proj.in_features
    known = known and (fused or getattr(attn, "v_proj", None) is not None)
    if readout == SELF_CORRELATION:
        grouped = getattr(attn, "num_kv_groups", 1) > 1
        known = known and type(attn) in (Attention, AttentionRope, EvaAttention) and not grouped
    if not known:
        raise ValueError(
            f'readout (MODEL.SPAR.READOUT) "{readout}" does not support the last block of this model; '
            "choose another read-out"
        )


def run_value_path(block: Any, x: torch.Tensor, prefix: int = 0) -> torch.Tensor:
    """Apply a block with each patch attending only to itself: (B, prefix + N, C) to (B, N, C).

    Queries and keys are not computed, and position embeddings have no effect.
    """
    return _run(block, x[:, prefix:], 0, _attend_to_self)


def run_self_correlation(block: Any, x: torch.Tensor, prefix: int, *rope: torch.Tensor) -> torch.Tensor:
    """Apply a block with :func:`attend_to_similar`: (B, prefix + N, C) to (B, N, C).

    Args:
        block: block of a timm ViT.
        x: tokens.
        prefix: number of tokens before the patches.
        rope: rotary position embeddings (N, 2 * d) of timm, if the model has them.
    """
    return run_correlated(block, x, prefix, lambda attn, x: query_key_value(attn, x, *rope))


def run_correlated(
    block: Any, x: torch.Tensor, prefix: int, heads: Callable[[Any, torch.Tensor], Heads]
) -> torch.Tensor:
    """Apply :func:`run_self_correlation` with another function for queries, keys and values."""

    def attend(attn: Any, x: torch.Tensor) -> torch.Tensor:
        # (B, heads, N, d) -> (B, N, C)
        return _project(attn, attend_to_similar(*heads(attn, x), prefix).transpose(1, 2).flatten(2))

    return _run(block, x, prefix, attend)


def query_key_value(attn: Any, x: torch.Tensor, rope: torch.Tensor | None = None) -> Heads:
    """Compute queries, keys and values (B, heads, N, d) of tokens (B, N, C), with norms and rotary embeddings."""
    if attn.qkv is None:
        parts = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        parts = F.linear(x, attn.qkv.weight, qkv_bias(attn)).chunk(3, dim=-1)
    query, key, value = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is not None:
        query, key = (_rotate(attn, part, rope).to(value.dtype) for part in (query, key))
    return query, key, value


def qkv_bias(attn: Any) -> torch.Tensor | None:
    """Return the bias of the joint projection to queries, keys and values; Eva's attention stores its parts."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv.bias
    return torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])


def _rotate(attn: Any, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    prefix = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=attn.rotate_half)
    return torch.cat([x[:, :, :prefix], rotated], dim=2)


def _run(block: Any, x: torch.Tensor, prefix: int, attend: Callable[[Any, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a block with another attention, which returns the patches (B, N, C) of tokens (B, prefix + N, C)."""
    patches = x[:, prefix:]
    if isinstance(block, EvaBlockPostNorm):
        patches = patches + block.norm1(attend(block.attn, x))
        return patches + block.norm2(block.mlp(patches))
    first, second = _layer_scales(block)
    patches = patches + first(attend(block.attn, block.norm1(x)))
    return patches + second(block.mlp(block.norm2(patches)))


def _layer_scales(block: Any) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    if isinstance(block, Block):
        return [block.ls1, block.ls2]
    gammas = (block.gamma_1, block.gamma_2)
    return [nn.Identity() if gamma is None else functools.partial(torch.mul, gamma) for gamma in gammas]


def _attend_to_self(attn: Any, x: torch.Tensor) -> torch.Tensor:
    if attn.qkv is None:
        return _project(attn, attn.v_proj(x))
    width = attn.proj.in_features
    bias = attn.v_bias if getattr(attn, "v_bias", None) is not None else attn.qkv.bias
    return _project(attn, F.linear(x, attn.qkv.weight[-width:], None if bias is None else bias[-width:]))


def _project(attn: Any, x: torch.Tensor) -> torch.Tensor:
    norm = getattr(attn, "norm", None)
    return attn.proj(x if norm is None else norm(x))
