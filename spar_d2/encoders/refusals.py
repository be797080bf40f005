"""Explains why a model is not supported."""

from __future__ import annotations

import os
from collections.abc import Mapping

import timm
from timm.models import model_entrypoint

from spar_d2.encoders.folders import CONFIG, OPEN_CLIP_CONFIG
from spar_d2.encoders.model_configs import model_config


def refusal(name: str) -> str:
    """Return why a model of timm or open_clip is not supported, or "" if neither library has such a model.

    Args:
        name: model name, open_clip model config file (*.json) or folder.
    """
    if os.path.isdir(name):
        return f"the folder has neither a {CONFIG} of spar-d2 export folder nor an {OPEN_CLIP_CONFIG}"
    architecture, _, tag = name.partition(".")
    if timm.is_model(name) and tag:
        return (
            f"it has a pretrained tag; set MODEL.SPAR.PRETRAINED to {tag!r} and MODEL.SPAR.ENCODER to {architecture!r}"
        )
    if timm.is_model(name):
        module = model_entrypoint(name).__module__.rpartition(".")[2]
        return (
            f"timm defines it in {module}.py, and only models of vision_transformer.py, deit.py and eva.py (vit_*, "
            "deit*, eva*) are ViTs that encode images of any size with one feature per patch"
        )
    config = model_config(name)
    if config is None:
        return ""
    vision = config["vision_cfg"]
    tower = vision.get("timm_model_name") or vision.get("hf_model_name")
    if not tower:
        tower = "a ViT with attentional pooling" if vision.get("attentional_pool") else "a ResNet"
    return f"its image tower in open_clip is {tower}, and not a plain ViT with one feature per patch"


def refuse_parts(encoder: str, reasons: Mapping[str, bool]) -> None:
    """Raise ``ValueError`` if a ViT has unsupported parts.

    Args:
        encoder: name of the encoder class.
        reasons: maps descriptions of unsupported parts to whether the ViT has them.
    """
    unsupported = [reason for reason, present in reasons.items() if present]
    if unsupported:
        raise ValueError(f"{encoder} does not support a ViT with {' and '.join(unsupported)}")
