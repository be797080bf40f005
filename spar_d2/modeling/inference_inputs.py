"""Inputs of segmentors, and their inference settings from a config."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from spar_d2.text import Vocabulary


def with_vocabulary(inputs: dict) -> dict:
    """Return an input whose "vocabulary", if present, is a :class:`Vocabulary`, so that it is parsed only once."""
    vocabulary = inputs.get("vocabulary")
    return inputs if vocabulary is None else {**inputs, "vocabulary": Vocabulary.of(vocabulary)}


def result_size(inputs: dict) -> tuple[int, int]:
    """Return (H, W) of the result: "height" and "width" of an input, or the size of its image."""
    height, width = inputs["image"].shape[-2:]
    return inputs.get("height", height), inputs.get("width", width)


def of_one_size(images: list[torch.Tensor]) -> list[list[int]]:
    """Group image indices by image size. Images of different sizes are never padded to a common size."""
    groups: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    return list(groups.values())


def inference_settings(cfg: CfgNode) -> dict:
    """Inference settings of a config, as arguments of the segmentor."""
    spar = cfg.MODEL.SPAR
    return {
        "vocabulary": _vocabulary(cfg),
        "logit_scale": spar.LOGIT_SCALE,
        "prob_threshold": spar.PROB_THRESHOLD,
        "area_threshold": spar.AREA_THRESHOLD,
    }


def _vocabulary(cfg: CfgNode) -> Vocabulary | None:
    """Return the configured classes, or those of the first test data set; None if not needed or not available."""
    if cfg.MODEL.SPAR.OUTPUT == "features":
        return None
    if cfg.MODEL.SPAR.VOCABULARY:
        return Vocabulary.load(cfg.MODEL.SPAR.VOCABULARY)
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        classes = metadata.get("stuff_classes")
        if vocabulary := metadata.get("vocabulary"):
            return Vocabulary.of(vocabulary)
        return Vocabulary(classes) if classes else None
    return None
