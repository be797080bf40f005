"""Tiny timm ViTs for the toy data set (64 pixels, patch size 8), registered with timm."""

from __future__ import annotations

from typing import Any, cast

import timm
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

__all__ = [
    "vit_nano_patch8_dinov2",
    "vit_nano_patch8_dinov3",
    "vit_nano_patch8_eva02_clip",
    "vit_nano_patch8_siglip_64",
]

_SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4}


@register_model
def vit_nano_patch8_siglip_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """SigLIP ViT with 5 blocks of 128 channels, without pre-trained weights."""
    model = timm.create_model("vit_base_patch16_siglip_224", **{**_SIZES, **kwargs})
    return cast("VisionTransformer", model)


@register_model
def vit_nano_patch8_dinov3(pretrained: bool = False, **kwargs: Any) -> Eva:
    """DINOv3 ViT with 5 blocks of 128 channels, without pre-trained weights.

    Layer scale is initialized with 1: with DINOv3's 1e-5, the blocks of an untrained model would have almost no effect.
    """
    model = timm.create_model("vit_small_patch16_dinov3", **{**_SIZES, "init_values": 1.0, **kwargs})
    return cast("Eva", model)


@register_model
def vit_nano_patch8_dinov2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DINOv2 ViT with 5 blocks of 128 channels and 4 register tokens, without pre-trained weights."""
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **{**_SIZES, "init_values": 1.0, **kwargs})
    return cast("VisionTransformer", model)


@register_model
def vit_nano_patch8_eva02_clip(pretrained: bool = False, **kwargs: Any) -> Eva:
    """EVA02-CLIP ViT with 5 blocks of 128 channels, without pre-trained weights."""
    return cast("Eva", timm.create_model("eva02_base_patch16_clip_224", **{**_SIZES, **kwargs}))
