"""Builds segmentors with their weights for inference."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor


def build_segmentor(cfg: CfgNode, weights: str = "", overrides: Sequence = ()) -> OpenVocabularySegmentor:
    """Build the model of a config for inference, in eval mode and with a frozen encoder.

    Args:
        cfg: config of the model, which is not modified.
        weights: weight file to load into the model or its encoder; "" keeps the pre-trained weights of the config.
        overrides: alternating config keys and values, as on a command line.

    Returns:
        The meta-architecture of the config, usually an ``OpenVocabularySegmentor``.
    """
    cfg = copy.deepcopy(cfg)
    cfg.defrost()
    cfg.merge_from_list(list(overrides))
    model = build_model(cfg).eval()
    if weights:
        Checkpointer(model).load(weights)
    model.backbone.encoder.freeze()
    return model
