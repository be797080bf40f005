"""Dense image encoders and their text towers, in plain PyTorch."""

from spar_d2.encoders import open_clip_models  # noqa: F401  registers the family
from spar_d2.encoders.base import DenseEncoder, find_encoder
from spar_d2.encoders.open_clip_vit import OpenCLIPEncoder
from spar_d2.encoders.registry import FAMILIES, build_encoder, build_text_tower, register_family
from spar_d2.encoders.text_tower import TextTower
from spar_d2.encoders.trainable import set_trainable

__all__ = [
    "FAMILIES",
    "DenseEncoder",
    "OpenCLIPEncoder",
    "TextTower",
    "build_encoder",
    "build_text_tower",
    "find_encoder",
    "register_family",
    "set_trainable",
]
