"""Dense image encoders and their text towers, independent of Detectron2."""

from spar_d2.encoders.base import DenseEncoder, find_encoder
from spar_d2.encoders.dinotxt import DINOtxtEncoder
from spar_d2.encoders.dinov3 import DINOv3Encoder
from spar_d2.encoders.open_clip_timm import OpenCLIPTimmEncoder
from spar_d2.encoders.open_clip_vit import OpenCLIPEncoder
from spar_d2.encoders.registry import (
    FAMILIES,
    EncoderInfo,
    EncoderSpec,
    build_encoder,
    build_text_tower,
    describe_encoder,
    register_family,
)
from spar_d2.encoders.siglip import SigLIPEncoder
from spar_d2.encoders.text_tower import TextTower
from spar_d2.encoders.timm_vit import TimmViTEncoder
from spar_d2.encoders.trainable import set_trainable
from spar_d2.toy import models as tiny_models  # noqa: F401  registers

__all__ = [
    "FAMILIES",
    "DINOtxtEncoder",
    "DINOv3Encoder",
    "DenseEncoder",
    "EncoderInfo",
    "EncoderSpec",
    "OpenCLIPEncoder",
    "OpenCLIPTimmEncoder",
    "SigLIPEncoder",
    "TextTower",
    "TimmViTEncoder",
    "build_encoder",
    "build_text_tower",
    "describe_encoder",
    "find_encoder",
    "register_family",
    "set_trainable",
]
