"""Dense encoder of timm's DINOv3 ViTs: patch tokens after the final norm, rotary position embeddings, no text tower."""

from __future__ import annotations

import functools
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.last_block import Heads, qkv_bias, run_correlated
from spar_d2.encoders.messages import KEY
from spar_d2.encoders.refusals import refuse_parts
from spar_d2.encoders.registry import EncoderSpec, register_family
from spar_d2.encoders.timm_family import PREFIX, TimmFamily
from spar_d2.encoders.timm_vit import TimmViTEncoder
from spar_d2.utils.transfer import send


def _query_key_value(attn: EvaAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Heads:
    """Compute rotated queries and keys, and values (B, heads, N, d) of tokens (B, N, C)."""
    # (B, N, 3C) -> (B, N, 3, heads, d)
    qkv = F.linear(x, cast(nn.Linear, attn.qkv).weight, qkv_bias(attn)).unflatten(-1, (3, attn.num_heads, -1))
    rotated = _rotate(qkv[:, :, :2], cos.to(qkv.dtype), sin.to(qkv.dtype))
    # (B, N, heads, d) -> (B, heads, N, d)
    query, key, value = (part.transpose(1, 2) for part in (*rotated.unbind(2), qkv[:, :, 2]))
    return query, key, value


def _run_self_correlation(
    block: EvaBlock, tokens: torch.Tensor, prefix: int, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    return run_correlated(block, tokens, prefix, lambda attn, x: _query_key_value(attn, x, cos, sin))


class DINOv3Encoder(TimmViTEncoder):
    """Dense features of a DINOv3 ViT, with faster rotary position embeddings than timm's.

    Args:
        visual: timm ``vit_*_patch16_dinov3*`` model. It is not copied. The keys of ``state_dict()`` are those of timm
            with the prefix "visual." ("visual.blocks.0...").
        reference_compat: the sliding window crops partial patches at the right and bottom, as the reference code does.
            A single pass always pads images.
        readout: see :class:`TimmViTEncoder`.

    Raises:
        ValueError: ``visual`` is not a supported model, or ``readout`` is unknown.
    """

    _self_correlation = staticmethod(_run_self_correlation)

    def __init__(self, visual: nn.Module, reference_compat: bool = False, readout: str = "tokens") -> None:
        _check(visual)
        super().__init__(visual, reference_compat, readout)

    def _rotations(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines (N, 1, 1, d) and sines (N, 1, 1, d / 2) for all tokens. Prefix tokens are not rotated."""
        weight = next(self.parameters())
        sin, cos = self._rotation_table(grid).chunk(2, dim=-1)
        ahead = (0, 0, self.prefix_tokens, 0)
        cos, sin = F.pad(cos, ahead, value=1.0), F.pad(sin[:, : sin.shape[1] // 2], ahead)
        cos, sin = (part[:, None, None].to(self._precision or weight.dtype) for part in (cos, sin))
        return send(cos, weight.device), send(sin, weight.device)

    @staticmethod
    def _step(block: EvaBlock, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        tokens = _add_scaled(
            tokens, block.gamma_1, _attend(cast(EvaAttention, block.attn), block.norm1(tokens), cos, sin)
        )
        return _add_scaled(tokens, block.gamma_2, block.mlp(block.norm2(tokens)))


def _attend(attn: EvaAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Self-attention with the weights of ``attn`` and rotated queries and keys: (B, N, C) to (B, N, C)."""
    mixed = F.scaled_dot_product_attention(*_query_key_value(attn, x, cos, sin))
    return attn.proj(mixed.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings to pairs of channels (i, i + d / 2), without copying the halves.

    Args:
        x: queries and keys (B, N, 2, heads, d).
        cos, sin: cosines (N, 1, 1, d) and sines (N, 1, 1, d / 2).
    """
    half = sin.shape[-1]
    result = x * cos
    result[..., :half].addcmul_(x[..., half:], sin, value=-1)
    result[..., half:].addcmul_(x[..., :half], sin)
    return result


def _add_scaled(tokens: torch.Tensor, scale: torch.Tensor | None, branch: torch.Tensor) -> torch.Tensor:
    return tokens + branch if scale is None else torch.addcmul(tokens, branch, scale)


def _check(visual: nn.Module) -> None:
    if not isinstance(visual, Eva):
        raise ValueError(f"visual must be a DINOv3 ViT of timm (vit_*_patch16_dinov3*), got {type(visual).__name__}")
    reasons = {
        "learned position embeddings": visual.pos_embed is not None,
        "no rotary position embeddings": visual.rope is None,
        "rotations other than DINOv3's": not getattr(visual.rope, "rotate_half", False),
        "blocks other than DINOv3's": not all(_is_plain(block) for block in visual.blocks),
    }
    refuse_parts("DINOv3Encoder", reasons)


def _is_plain(block: nn.Module) -> bool:
    """Return whether :meth:`DINOv3Encoder._step` implements the block."""
    if type(block) is not EvaBlock or type(attn := block.attn) is not EvaAttention or attn.qkv is None:
        return False
    inner = (attn.q_norm, attn.k_norm, attn.norm)
    gated = getattr(attn, "gate", None) is not None
    return not gated and not attn.qkv_bias_separate and all(isinstance(norm, nn.Identity) for norm in inner)


@functools.cache
def _names() -> list[str]:
    return timm.list_models("vit_*_dinov3*")


class DINOv3Family(TimmFamily):
    """timm's DINOv3 ViTs."""

    name = "DINOv3"
    marks = ("visual.patch_embed.proj.weight", "visual.cls_token", "visual.blocks.0.attn.qkv.weight")
    toy = "vit_nano_patch8_dinov3"
    absent = ("visual.pos_embed", "visual.attn_pool.kv.weight")
    encoder_class = DINOv3Encoder

    def claims(self, name: str) -> bool:
        return name in _names()

    def names(self) -> list[str]:
        return _names()

    def example(self) -> DenseEncoder:
        # With DINOv3's layer scale of 1e-5, the blocks of an untrained model would have almost no effect.
        sizes = {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3, "init_values": 1.0}
        return DINOv3Encoder(timm.create_model("vit_small_patch16_dinov3", num_classes=0, **sizes))

    def _converted(
        self, tensors: dict[str, torch.Tensor], encoder: TimmViTEncoder, spec: EncoderSpec
    ) -> dict[str, torch.Tensor]:
        if f"{PREFIX}storage_tokens" not in tensors:  # not a file of Meta
            return tensors
        biases = [t.chunk(3) for name, t in tensors.items() if name.endswith("attn.qkv.bias")]
        biased = any(query.any() or value.any() for query, _, value in biases)
        if biased and cast(Any, encoder.blocks[0]).attn.q_bias is None:
            raise RuntimeError(
                f"{KEY}: {spec.pretrained} has query and value biases, but {spec.name} has none; "
                f"set MODEL.SPAR.ENCODER to {spec.name}_qkvb"
            )
        return super()._converted(tensors, encoder, spec)


register_family(DINOv3Family())
