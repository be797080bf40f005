"""Dense encoder of timm's DINOv3 ViTs: normalized patch tokens, rotary position embeddings, no text tower."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from torch import nn

from spar_d2.encoders.base import DenseEncoder, last, refuse_parts, to_map
from spar_d2.encoders.fit import check_fit
from spar_d2.encoders.messages import KEY
from spar_d2.encoders.model_configs import timm_sizes
from spar_d2.encoders.origin import Conventions, check_triple
from spar_d2.encoders.registry import EncoderFamily, EncoderSpec, register_family
from spar_d2.encoders.weights import failed_download, fixed_random_weights, no_such_weights, read_state_dict
from spar_d2.utils.transfer import send

_PREFIX = "visual."


class DINOv3Encoder(DenseEncoder):
    """Dense features of a DINOv3 ViT.

    Args:
        visual: timm ``vit_*_patch16_dinov3*`` model. It is not copied. The keys of ``state_dict()`` are those of timm
            with the prefix "visual." ("visual.blocks.0...").
        reference_compat: the sliding window crops partial patches at the right and bottom, as the reference code does.
            A single pass always pads images.

    Raises:
        ValueError: ``visual`` is not a supported model.
    """

    parts = {
        "qkv": r"attn\.(qkv\.|[qkv]_proj\.|[qv]_bias$)",
        "mlp": r"mlp\.",
        "patchembed": r"visual\.patch_embed\.",
    }
    unused = r"visual\.(head|fc_norm)\."

    def __init__(self, visual: nn.Module, reference_compat: bool = False) -> None:
        super().__init__()
        self.visual = trunk = _checked(visual)
        self.reference_compat = reference_compat
        self.patch_size = cast(tuple[int, int], trunk.patch_embed.patch_size)[0]
        self.native_size = trunk.patch_embed.grid_size[0] * self.patch_size
        self.width = self.embed_dim = trunk.embed_dim
        self.prefix_tokens = trunk.num_prefix_tokens
        # timm builds position grids on the CPU and synchronizes with the GPU to copy them. To avoid this, a CPU copy of
        # the module computes rotations. The tuple hides it from nn.Module, so it is not part of the model.
        self._rope = (cast(RotaryEmbeddingDinoV3, copy.deepcopy(trunk.rope)),)
        cfg = getattr(trunk, "pretrained_cfg", {})
        self.pixel_mean = tuple(cfg.get("mean", IMAGENET_DEFAULT_MEAN))
        self.pixel_std = tuple(cfg.get("std", IMAGENET_DEFAULT_STD))
        self.eval()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.visual.blocks

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        tokens, grid, context = self._embed(x)
        tokens = self.visual.norm(last(self._run_blocks(self.blocks, tokens, *context)))
        return to_map(tokens[:, self.prefix_tokens :], grid)

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        visual = self.visual
        patches = visual.patch_embed.proj(x)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = visual.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        prefix = [token for token in (visual.cls_token, visual.reg_token) if token is not None]
        tokens = torch.cat([*(token.to(patches.dtype).expand(len(x), -1, -1) for token in prefix), patches], dim=1)
        return visual.norm_pre(tokens), grid, self._of_grid(grid, lambda: self._rotations(grid))

    def _rotations(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines (N, 1, 1, d) and sines (N, 1, 1, d / 2) for all tokens. Prefix tokens are not rotated."""
        weight = next(self.parameters())
        sin, cos = self._rope[0].cpu().get_embed(shape=list(grid)).chunk(2, dim=-1)
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
    batch, tokens, _ = x.shape
    bias = None
    if attn.q_bias is not None and attn.v_bias is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    # (B, N, 3C) -> (B, N, 3, heads, d)
    qkv = F.linear(x, cast(nn.Linear, attn.qkv).weight, bias).unflatten(-1, (3, attn.num_heads, -1))
    rotated = _rotate(qkv[:, :, :2], cos.to(qkv.dtype), sin.to(qkv.dtype))
    # (B, N, heads, d) -> (B, heads, N, d)
    query, key, value = (part.transpose(1, 2) for part in (*rotated.unbind(2), qkv[:, :, 2]))
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attn.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


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


def _checked(visual: nn.Module) -> Eva:
    if not isinstance(visual, Eva):
        raise ValueError(f"visual must be a DINOv3 ViT of timm (vit_*_patch16_dinov3*), got {type(visual).__name__}")
    reasons = {
        "learned position embeddings": visual.pos_embed is not None,
        "no rotary position embeddings": visual.rope is None,
        "rotations that differ between blocks": visual.rope_mixed,
        "rotations other than DINOv3's": not getattr(visual.rope, "rotate_half", False),
        "blocks other than DINOv3's": not all(_is_plain(block) for block in visual.blocks),
        "non-square patches": len(set(visual.patch_embed.patch_size)) > 1,
    }
    refuse_parts("DINOv3Encoder", reasons)
    return visual


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


@functools.cache
def _tags(name: str) -> list[str]:
    return [full.split(".", 1)[1] for full in timm.list_pretrained(f"{name}.*")]


def _from_meta(tensors: Mapping[str, torch.Tensor], trunk: Eva, spec: EncoderSpec) -> dict[str, torch.Tensor]:
    """Convert the keys of Meta's weight files to those of timm, with timm's conversion function."""
    biases = [t.chunk(3) for name, t in tensors.items() if name.endswith("attn.qkv.bias")]
    if any(query.any() or value.any() for query, _, value in biases) and cast(Any, trunk.blocks[0]).attn.q_bias is None:
        raise RuntimeError(
            f"{KEY}: {spec.pretrained} has query and value biases, but {spec.name} has none; "
            f"set MODEL.SPAR.ENCODER to {spec.name}_qkvb"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # timm prints a line for each bias that it drops
        converted = checkpoint_filter_fn(
            {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}, trunk
        )
    return {f"{_PREFIX}{name}": tensor for name, tensor in converted.items()}


class DINOv3Family(EncoderFamily):
    """timm's DINOv3 ViTs."""

    name = "DINOv3"
    marks = ("visual.patch_embed.proj.weight", "visual.cls_token", "visual.blocks.0.attn.qkv.weight")
    has_text = False
    file_format = "timm"
    timm_prefix = _PREFIX

    def claims(self, name: str) -> bool:
        return name in _names()

    def names(self) -> list[str]:
        return _names()

    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        return timm_sizes(spec.name)

    def conventions(self, spec: EncoderSpec) -> Conventions:
        cfg = timm.get_pretrained_cfg(self._full_name(spec)) or timm.get_pretrained_cfg(spec.name)
        mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if cfg is None else (cfg.mean, cfg.std)
        return Conventions(check_triple(mean, "mean"), check_triple(std, "std", above=0))

    def tags(self, name: str) -> list[str]:
        return _tags(name)

    def build(self, spec: EncoderSpec) -> DenseEncoder:
        name, pretrained = spec.name, spec.pretrained
        if pretrained in _tags(name):
            try:
                trunk = timm.create_model(self._full_name(spec), pretrained=True, num_classes=0)
            except Exception as error:  # the Hugging Face Hub client may raise anything
                raise failed_download(name, pretrained, error) from error
            return DINOv3Encoder(trunk, spec.reference_compat)
        with fixed_random_weights():
            encoder = DINOv3Encoder(timm.create_model(name, num_classes=0), spec.reference_compat)
        if pretrained:
            self._load(encoder, spec)
        return encoder

    def example(self) -> DenseEncoder:
        # With DINOv3's layer scale of 1e-5, the blocks of an untrained model would have almost no effect.
        sizes = {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3, "init_values": 1.0}
        return DINOv3Encoder(timm.create_model("vit_small_patch16_dinov3", num_classes=0, **sizes))

    def from_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Weight files of timm and Meta lack the prefix "visual.".
        if "patch_embed.proj.weight" in tensors and "cls_token" in tensors:
            return {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        return dict(tensors)

    @staticmethod
    def _full_name(spec: EncoderSpec) -> str:
        return f"{spec.name}.{spec.pretrained}" if spec.pretrained in _tags(spec.name) else spec.name

    def _load(self, encoder: DINOv3Encoder, spec: EncoderSpec) -> None:
        if not Path(spec.pretrained).is_file():
            raise no_such_weights(spec.name, spec.pretrained, _tags(spec.name))
        tensors = self.from_file(read_state_dict(spec.pretrained, part=spec.pretrained_part))
        if f"{_PREFIX}storage_tokens" in tensors:
            tensors = _from_meta(tensors, encoder.visual, spec)
        expected = encoder.state_dict()
        check_fit(expected, tensors, expected, spec.pretrained)
        encoder.load_state_dict(tensors)


register_family(DINOv3Family())
