"""Builds the parts of a MaskTransformer from a config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.joined_queries import check_joined
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.mask_transformer.classifiers import LearnedClassifier, TextClassifier
from spar_d2.modeling.mask_transformer.head import MaskTransformerHead
from spar_d2.modeling.mask_transformer.joined_head import JoinedHead
from spar_d2.modeling.mask_transformer.losses import Criterion
from spar_d2.modeling.mask_transformer.matching import Weights
from spar_d2.modeling.mask_transformer.vocabulary_classes import VocabularyClasses

logger = logging.getLogger(__name__)

TASKS = ("panoptic", "semantic")
CLASSIFIERS = ("learned", "text")
OUTPUTS = ("panoptic_seg", "sem_seg", "instances")
# Number of intermediate feature maps by default.
_LATERALS = 3


def settings(cfg: CfgNode, backbone: Any) -> dict[str, Any]:
    """Return the arguments of :class:`MaskTransformer` for a config.

    Raises:
        ValueError: a key is invalid; the message names it.
    """
    node, spar = cfg.MODEL.MASK_TRANSFORMER, cfg.MODEL.SPAR
    if not isinstance(backbone, SPARViT):
        raise ValueError(f"MODEL.BACKBONE.NAME must be SPARViT for MaskTransformer, got {cfg.MODEL.BACKBONE.NAME}")
    _check(cfg)
    encoder = backbone.encoder
    panoptic = node.TASK == TASKS[0]
    things = cfg.MODEL.ROI_HEADS.NUM_CLASSES if panoptic else 0
    stuff = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES - 1 if panoptic else cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if min(things, stuff) < 0 or things + stuff < 1:
        counts = "MODEL.SEM_SEG_HEAD.NUM_CLASSES" + (" and MODEL.ROI_HEADS.NUM_CLASSES" if panoptic else "")
        raise ValueError(
            f"{counts} must give at least one class, got {things} things and {stuff} stuff classes"
            f"{' plus one' if panoptic else ''}"
        )
    laterals = lateral_blocks(encoder, node.LATERAL_BLOCKS, node.BLOCKS)
    widths = [*[encoder.width] * len(laterals), encoder.embed_dim]
    size = (node.QUERIES, node.WIDTH, node.BLOCKS, node.HEADS)
    head: MaskTransformerHead | JoinedHead
    if node.ENCODER_BLOCKS:
        check_joined(encoder, node.ENCODER_BLOCKS)
        if not any(p.requires_grad for block in encoder.blocks[-node.ENCODER_BLOCKS :] for p in block.parameters()):
            logger.warning(
                "MODEL.MASK_TRANSFORMER.ENCODER_BLOCKS: the last %d blocks do not know queries, and "
                "MODEL.SPAR.TRAINABLE %s does not train them; use last_blocks:%d or all for a training",
                *(node.ENCODER_BLOCKS, spar.TRAINABLE, node.ENCODER_BLOCKS),
            )
        head = JoinedHead(encoder.width, encoder.patch_size, node.QUERIES, node.WIDTH, node.ENCODER_BLOCKS)
    else:
        share, tested = (node.CENTER_SHARE, node.TEST_CENTERS) if things else (0.0, 0)
        head = MaskTransformerHead(widths, encoder.patch_size, *size, spar.CHECKPOINTING, share, tested)
    vocabulary = None
    if node.CLASSIFIER == CLASSIFIERS[0]:
        classifier: LearnedClassifier | TextClassifier = LearnedClassifier(node.WIDTH, things + stuff)
    else:
        vocabulary = VocabularyClasses.of_config(cfg, things, stuff)
        classifier = TextClassifier(node.WIDTH, encoder.embed_dim)
    weights = Weights(node.CLASS_WEIGHT, node.MASK_WEIGHT, node.DICE_WEIGHT)
    return {
        "backbone": backbone,
        "head": head,
        "classifier": classifier,
        "criterion": Criterion(weights, node.NO_OBJECT_WEIGHT, node.POINTS, node.CENTER_WEIGHT),
        "things": things,
        "stuff": stuff,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "task": node.TASK,
        "laterals": laterals,
        "masked_attention": node.MASKED_ATTENTION,
        "max_iter": cfg.SOLVER.MAX_ITER,
        "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "outputs": chosen_outputs(node),
        "labels": spar.OUTPUT == "labels",
        "object_threshold": node.OBJECT_THRESHOLD,
        "overlap_threshold": node.OVERLAP_THRESHOLD,
        "duplicate_threshold": node.DUPLICATE_THRESHOLD,
        "detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "vocabulary": vocabulary,
        "inference": spar.INFERENCE,
        "window": cfg.SPAR.TEACHER.WINDOW,
        "stride": cfg.SPAR.TEACHER.STRIDE,
        "window_batch": cfg.SPAR.TEACHER.BATCH_SIZE,
    }


def chosen_outputs(node: CfgNode) -> tuple[str, ...]:
    """Return the outputs of a model by its keys ``MODEL.MASK_TRANSFORMER``."""
    return tuple(node.OUTPUTS) or (OUTPUTS[0] if node.TASK == TASKS[0] else OUTPUTS[1],)


def lateral_blocks(encoder: DenseEncoder, chosen: Sequence[int], limit: int) -> list[int]:
    """Return the blocks whose outputs are used beside the dense features: those chosen, or up to three spread evenly.

    Args:
        encoder: encoder.
        chosen: numbers of blocks; empty for a default.
        limit: number of blocks of the head, and so of feature maps that it can add.

    Raises:
        ValueError: a number is no block before the last one.
    """
    last = len(encoder.blocks) - 1
    if not chosen:
        count = min(_LATERALS, last, limit)
        return sorted({min(last - 1, round((number + 1) * (last + 1) / (count + 1)) - 1) for number in range(count)})
    if not all(isinstance(number, int) and 0 <= number < last for number in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"MODEL.MASK_TRANSFORMER.LATERAL_BLOCKS must be different blocks in 0..{last - 1}, before the last one; "
            f"got {tuple(chosen)}"
        )
    return list(chosen)


def _check(cfg: CfgNode) -> None:
    node, prefix = cfg.MODEL.MASK_TRANSFORMER, "MODEL.MASK_TRANSFORMER"
    for key, allowed in (("TASK", TASKS), ("CLASSIFIER", CLASSIFIERS)):
        if node[key] not in allowed:
            raise ValueError(f"{prefix}.{key} must be one of {', '.join(allowed)}; got {node[key]!r}")
    allowed = OUTPUTS if node.TASK == TASKS[0] else OUTPUTS[1:2]
    if isinstance(node.OUTPUTS, str) or not set(node.OUTPUTS) <= set(allowed):
        raise ValueError(f"{prefix}.OUTPUTS must be a list out of {', '.join(allowed)}; got {node.OUTPUTS!r}")
    ranges = {
        "CENTER_SHARE": (0, 1),
        "TEST_CENTERS": (0, 10**6),
        "MASKED_ATTENTION": (0, 1),
        "OBJECT_THRESHOLD": (0, 1),
        "OVERLAP_THRESHOLD": (0, 1),
        "DUPLICATE_THRESHOLD": (0, 1),
        "SEEN_WEIGHT": (0, 1),
        "UNSEEN_WEIGHT": (0, 1),
        "NO_OBJECT_WEIGHT": (0, 1),
        "POINTS": (1, 10**6),
        "CLASS_WEIGHT": (0, 10**6),
        "MASK_WEIGHT": (0, 10**6),
        "DICE_WEIGHT": (0, 10**6),
        "CENTER_WEIGHT": (0, 10**6),
    }
    for key, (least, most) in ranges.items():
        if not least <= node[key] <= most:
            raise ValueError(f"{prefix}.{key} must be in {least}..{most}, got {node[key]}")
    if node.UNSEEN and node.CLASSIFIER != CLASSIFIERS[1]:
        raise ValueError(f"{prefix}.UNSEEN leaves classes out of the training; it needs {prefix}.CLASSIFIER text")
    if cfg.TEST.DETECTIONS_PER_IMAGE < 0:
        raise ValueError(f"TEST.DETECTIONS_PER_IMAGE must be at least 0, got {cfg.TEST.DETECTIONS_PER_IMAGE}")
    for key, used in (("TEST.AUG.ENABLED", cfg.TEST.AUG.ENABLED), ("MODEL.SPAR.REFINE", cfg.MODEL.SPAR.REFINE)):
        if used:
            raise ValueError(f"{key} is not supported by MaskTransformer; got {used!r}")
    if cfg.MODEL.SPAR.REFERENCE_COMPAT:
        raise ValueError("MODEL.SPAR.REFERENCE_COMPAT must be False for MaskTransformer: it crops or stretches images")
    if cfg.MODEL.SPAR.OUTPUT not in ("labels", "scores"):
        raise ValueError(
            f"MODEL.SPAR.OUTPUT must be labels or scores for MaskTransformer, got {cfg.MODEL.SPAR.OUTPUT!r}"
        )
