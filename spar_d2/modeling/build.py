"""From a config to its encoder and text tower."""

from __future__ import annotations

from detectron2.config import CfgNode

from spar_d2.encoders import DenseEncoder, EncoderSpec
from spar_d2.encoders.registry import build


def encoder_spec(cfg: CfgNode) -> EncoderSpec:
    """What ``MODEL.SPAR`` says of the encoder."""
    spar = cfg.MODEL.SPAR
    return EncoderSpec(
        name=spar.ENCODER,
        pretrained=spar.PRETRAINED,
        reference_compat=spar.REFERENCE_COMPAT,
        dinov3_repo=spar.DINOV3_REPO,
        dinov3_backbone=spar.DINOV3_BACKBONE,
        dinov3_tokens=spar.DINOV3_TOKENS,
    )


def encoder_from_config(cfg: CfgNode) -> DenseEncoder:
    """The encoder of ``MODEL.SPAR``, on the CPU, computing as the config says; raises like ``build_encoder``."""
    spar = cfg.MODEL.SPAR
    return build(encoder_spec(cfg)).accelerate(spar.PRECISION, spar.COMPILE, spar.CHECKPOINTING)
