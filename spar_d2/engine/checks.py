"""Checks of a training's config, before anything is built."""

from __future__ import annotations

import logging
import math

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from spar_d2.encoders.precision import PRECISIONS
from spar_d2.modeling.build import precision_from_config

logger = logging.getLogger(__name__)


def check_config(cfg: CfgNode) -> None:
    """Raise ``ValueError`` for values that no training can use."""
    solver, spar = cfg.SOLVER, cfg.SPAR
    at_least = {
        "SOLVER.IMS_PER_BATCH": (solver.IMS_PER_BATCH, 1),
        "SOLVER.MAX_ITER": (solver.MAX_ITER, 1),
        "SOLVER.CHECKPOINT_PERIOD": (solver.CHECKPOINT_PERIOD, 1),
        "SPAR.ACCUMULATION_STEPS": (spar.ACCUMULATION_STEPS, 1),
        "SPAR.KEEP_CHECKPOINTS": (spar.KEEP_CHECKPOINTS, 0),
        "SPAR.PICTURE_PERIOD": (spar.PICTURE_PERIOD, 0),
        "SPAR.DATA.MAX_DAMAGED": (spar.DATA.MAX_DAMAGED, 0),
    }
    for key, (value, least) in at_least.items():
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    if not 0 < solver.BASE_LR < math.inf:
        raise ValueError(f"SOLVER.BASE_LR must be above 0, got {solver.BASE_LR}")
    processes = comm.get_world_size()
    if solver.IMS_PER_BATCH % (processes * spar.ACCUMULATION_STEPS):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of {processes} processes times SPAR.ACCUMULATION_STEPS "
            f"{spar.ACCUMULATION_STEPS}, got {solver.IMS_PER_BATCH}"
        )
    if spar.DISTILL.AVERAGE == "cell" and spar.ACCUMULATION_STEPS > 1:
        raise ValueError(
            'SPAR.DISTILL.AVERAGE "cell" needs the images of a step together: SPAR.ACCUMULATION_STEPS must be 1, '
            f"got {spar.ACCUMULATION_STEPS}"
        )
    if spar.DISTILL.ENABLED and spar.TEACHER.CACHE_DIR and not spar.DATA.FROZEN:
        raise ValueError(
            "SPAR.TEACHER.CACHE_DIR needs SPAR.DATA.FROZEN True: images that are augmented anew in every epoch are "
            "never found in a cache"
        )


def check_sides(cfg: CfgNode, patch: int) -> None:
    """Raise ``ValueError`` where training images would not have whole patches of that side in pixels."""
    if cfg.SPAR.DATA.SIDE_MULTIPLE % patch:
        raise ValueError(
            f"SPAR.DATA.SIDE_MULTIPLE must be a multiple of the patch of {cfg.MODEL.SPAR.ENCODER}, {patch} pixels; "
            f"got {cfg.SPAR.DATA.SIDE_MULTIPLE}"
        )


def mixed_precision(cfg: CfgNode) -> tuple[torch.dtype | None, bool]:
    """Precision of autocast over the whole model, if any, and whether gradients are scaled."""
    own = PRECISIONS[precision_from_config(cfg)]
    if not cfg.SOLVER.AMP.ENABLED:
        return None, own is torch.float16
    if own is None and cfg.MODEL.DEVICE == "cpu":
        logger.warning(
            "SOLVER.AMP.ENABLED: float16, which is Detectron2's, would take minutes a step on a CPU, so training is in "
            "float32; MODEL.SPAR.PRECISION chooses another precision"
        )
        return None, False
    # Without a choice, what Detectron2's own mixed precision is.
    whole = own or torch.float16
    return whole, whole is torch.float16
