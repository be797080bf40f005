"""Dense encoders of SigLIP and SigLIP2: open_clip models whose image trunk is a timm ViT with attention pooling.

Each patch token passes through the value projection, output projection and residual MLP of the pooling layer; its
attention is skipped (SPAR, arXiv:2604.02252).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spar_d2.encoders.base import Context, DenseEncoder
from spar_d2.encoders.last_block import check_last_block, run_self_correlation
from spar_d2.encoders.model_configs import conventions, known_config, timm_sizes
from spar_d2.encoders.open_clip_models import OpenCLIPModelFamily
from spar_d2.encoders.origin import Conventions
from spar_d2.encoders.positions import resample_positions, sampling_weights
from spar_d2.encoders.refusals import refuse_parts
from spar_d2.encoders.registry import EncoderSpec, register_family
from spar_d2.encoders.self_correlation import SELF_CORRELATION, check_readout

_MEAN = _STD = (0.5, 0.5, 0.5)
_TRUNK = "visual.trunk."


class SigLIPEncoder(DenseEncoder):
    """Dense features of the image tower of a SigLIP or SigLIP2 model.

    Args:
        visual: ``model.visual`` of an open_clip model: a module with ``.trunk``, a timm ``VisionTransformer`` with
            ``global_pool="map"`` and without class token. It is not copied. The keys of ``state_dict()`` are those of
            open_clip ("visual.trunk.blocks.0...").
        reference_compat: the sliding window crops partial patches at the right and bottom, as the reference code does.
            A single pass always pads images.
        readout: "" for the tokens of the last block; "self_correlation" to replace its attention by
            :func:`~spar_d2.encoders.self_correlation.attend_to_similar`. Both pass through the pooling layer.

    Raises:
        ValueError: ``visual`` is not a supported image tower, or ``readout`` is unknown.
    """

    parts = {
        "qkv": r"attn\.qkv\.",
        "mlp": r"mlp\.",
        "posembed": r"visual\.trunk\.pos_embed",
        "patchembed": r"visual\.trunk\.patch_embed\.",
        "attn_pool_kv": r"visual\.trunk\.attn_pool\.kv\.",
    }
    unused = r"visual\.(trunk\.)?(head|fc_norm)\.|visual\.trunk\.attn_pool\.(latent$|q\.|[qk]_norm\.)"
    pixel_mean, pixel_std = _MEAN, _STD
    readout = ""

    def __init__(self, visual: nn.Module, reference_compat: bool = False, readout: str = "") -> None:
        super().__init__()
        trunk = _checked_trunk(visual)
        check_readout(readout, "", SELF_CORRELATION)
        if readout:  # cache keys cover attributes of the instance
            check_last_block(trunk.blocks[-1], readout)
            self.readout = readout
        self.visual = visual
        self.reference_compat = reference_compat
        self.patch_size = trunk.patch_embed.patch_size[0]
        self.native_size = trunk.patch_embed.grid_size[0] * self.patch_size
        self.width = trunk.embed_dim
        self.embed_dim = self.pool.out_features
        for block in self.blocks:
            # Without fused attention (timm has an environment variable to disable it), memory is O(N^2).
            cast(Any, block).attn.fused_attn = True
        self.eval()

    @property
    def trunk(self) -> VisionTransformer:
        """The timm ViT in the image tower."""
        return cast(VisionTransformer, self.visual.trunk)

    @property
    def pool(self) -> AttentionPoolLatent:
        """The attention pooling at the end of the trunk."""
        return cast(AttentionPoolLatent, self.trunk.attn_pool)

    @property
    def blocks(self) -> nn.Sequential:
        return self.trunk.blocks

    def _last_call(self, context: Context) -> tuple[Callable, Context]:
        return (run_self_correlation, (0,)) if self.readout else (self._step, context)

    def _read(self, tokens: torch.Tensor, patches: int) -> torch.Tensor:
        return pool_each(self.pool, self.trunk.norm(tokens))

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...]]:
        trunk = self.trunk
        patches = trunk.patch_embed.proj(x)
        grid = (patches.shape[-2], patches.shape[-1])
        native = trunk.patch_embed.grid_size
        weights = functools.partial(self._of_grid, grid, lambda: sampling_weights(native, grid, 0.0, x.device))
        positions = resample_positions(cast(torch.Tensor, trunk.pos_embed)[0], native, grid, weights=weights)
        tokens = trunk.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        return trunk.norm_pre(tokens + positions.to(tokens.dtype)), grid, ()

    @staticmethod
    def _step(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return block(tokens)


def pool_each(pool: AttentionPoolLatent, tokens: torch.Tensor) -> torch.Tensor:
    """Apply the pooling layer with each token attending only to itself: (B, N, C) to (B, N, D)."""
    half = pool.kv.out_features // 2
    bias = None if pool.kv.bias is None else pool.kv.bias[half:]
    value = pool.proj(F.linear(tokens, pool.kv.weight[half:], bias))
    return value if pool.mlp is None else value + pool.mlp(pool.norm(value))


def _checked_trunk(visual: nn.Module) -> VisionTransformer:
    trunk = getattr(visual, "trunk", None)
    if not isinstance(trunk, VisionTransformer) or not isinstance(trunk.attn_pool, AttentionPoolLatent):
        raise ValueError(
            "visual must be the image tower of a SigLIP model (model.visual of open_clip, whose .trunk is a timm "
            f"VisionTransformer with attention pooling), got {type(visual).__name__}"
        )
    reasons = {
        "prefix tokens": trunk.num_prefix_tokens > 0,
        "no position embedding": trunk.pos_embed is None,
        "position embeddings in the pooling layer": trunk.attn_pool.pos_embed is not None,
        "non-square patches": len(set(trunk.patch_embed.patch_size)) > 1,
        "a head after the pooling layer": any(True for _ in getattr(visual, "head", nn.Identity()).parameters()),
    }
    refuse_parts("SigLIPEncoder", reasons)
    return trunk


def is_siglip(config: dict | None) -> bool:
    """Return whether an open_clip config describes a SigLIP model."""
    vision = (config or {}).get("vision_cfg", {})
    timm_name = str(vision.get("timm_model_name", ""))
    return "siglip" in timm_name and vision.get("timm_pool") == "map" and vision.get("timm_proj") == "none"


class SigLIPFamily(OpenCLIPModelFamily):
    """SigLIP and SigLIP2 models of open_clip."""

    name = "SigLIP"
    marks = ("visual.trunk.attn_pool.kv.weight", "visual.trunk.pos_embed")
    toy = "toy/tiny_pooled.json"
    encoder_class = SigLIPEncoder
    accepts = staticmethod(is_siglip)
    absent = ("visual.trunk.cls_token",)
    timm_prefix = _TRUNK

    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        name = known_config(spec.name)["vision_cfg"]["timm_model_name"]
        try:
            return timm_sizes(name)
        except Exception as error:  # timm may raise anything for a name in a config file
            raise ValueError(f"MODEL.SPAR.ENCODER: timm cannot build {name!r} of {spec.name} ({error})") from error

    def conventions(self, spec: EncoderSpec) -> Conventions:
        # The timm trunk has a fixed activation.
        return dataclasses.replace(conventions(spec.name, spec.pretrained, _MEAN, _STD), quick_gelu=None)

    def example(self) -> DenseEncoder:
        sizes: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 3}
        visual = nn.Module()
        visual.trunk = VisionTransformer(**sizes, class_token=False, global_pool="map", num_classes=0)
        return SigLIPEncoder(visual)

    def from_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Weight files of only the timm trunk lack the prefixes "visual." and "trunk.".
        if "attn_pool.kv.weight" in tensors:
            return {f"{_TRUNK}{key}": tensor for key, tensor in tensors.items() if not key.startswith("head.")}
        if "trunk.attn_pool.kv.weight" in tensors:
            return {f"visual.{key}": tensor for key, tensor in tensors.items()}
        return dict(tensors)


register_family(SigLIPFamily())
