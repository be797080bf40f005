"""Validation of training configs."""

from __future__ import annotations

import logging
import math

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from spar_d2.data.build import MASK_TRANSFORMER
from spar_d2.encoders.precision import PRECISIONS
from spar_d2.modeling.build import precision_from_config
from spar_d2.modeling.mask_transformer.settings import chosen_outputs

logger = logging.getLogger(__name__)


def check_config(cfg: CfgNode) -> None:
    """Raise ``ValueError`` for invalid training settings."""
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
        raise ValueError(f"SOLVER.BASE_LR must be greater than 0, got {solver.BASE_LR}")
    processes = comm.get_world_size()
    if solver.IMS_PER_BATCH % (processes * spar.ACCUMULATION_STEPS):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of {processes} processes times SPAR.ACCUMULATION_STEPS "
            f"{spar.ACCUMULATION_STEPS}, got {solver.IMS_PER_BATCH}"
        )
    if spar.DISTILL.AVERAGE == "cell" and spar.ACCUMULATION_STEPS > 1:
        raise ValueError(
            'SPAR.ACCUMULATION_STEPS must be 1 with SPAR.DISTILL.AVERAGE "cell", which averages over all images of a '
            f"step; got {spar.ACCUMULATION_STEPS}"
        )
    if spar.DISTILL.ENABLED and spar.TEACHER.CACHE_DIR and not spar.DATA.FROZEN:
        raise ValueError(
            "SPAR.TEACHER.CACHE_DIR requires SPAR.DATA.FROZEN True, because cached targets are valid only if the "
            "augmentation of each image never changes"
        )
    images = solver.MAX_ITER * solver.IMS_PER_BATCH
    if spar.DISTILL.ENABLED and spar.TEACHER.PROJECTION and images <= spar.TEACHER.PROJECTION_IMAGES:
        raise ValueError(
            "SPAR.TEACHER.PROJECTION_IMAGES must be less than the images of the training, because nothing is learned "
            f"before they have been seen; got {spar.TEACHER.PROJECTION_IMAGES} of {images} (SOLVER.MAX_ITER times "
            "SOLVER.IMS_PER_BATCH)"
        )


def check_outputs(cfg: CfgNode, dataset: str, evaluator_type: str) -> None:
    """Raise ``ValueError`` if a MaskTransformer does not have the output that a data set is evaluated by."""
    if cfg.MODEL.META_ARCHITECTURE != MASK_TRANSFORMER:
        return
    node = cfg.MODEL.MASK_TRANSFORMER
    outputs = chosen_outputs(node)
    needed = "panoptic_seg" if evaluator_type.endswith("panoptic_seg") else "sem_seg"
    if needed not in outputs:
        raise ValueError(
            f"MODEL.MASK_TRANSFORMER.OUTPUTS must contain {needed} for the evaluation on {dataset!r}; got "
            f"{outputs} with TASK {node.TASK}. Change the keys, or DATASETS.TEST"
        )


def check_sides(cfg: CfgNode, patch: int) -> None:
    """Raise ``ValueError`` if sides of training images are not multiples of the patch size."""
    if cfg.SPAR.DATA.SIDE_MULTIPLE % patch:
        raise ValueError(
            f"SPAR.DATA.SIDE_MULTIPLE must be a multiple of {patch}, the patch size of {cfg.MODEL.SPAR.ENCODER}; "
            f"got {cfg.SPAR.DATA.SIDE_MULTIPLE}"
        )


def mixed_precision(cfg: CfgNode) -> tuple[torch.dtype | None, bool]:
    """Return the autocast dtype of the whole model (None: no autocast), and whether to scale gradients."""
    encoder_dtype = PRECISIONS[precision_from_config(cfg)]
    if not cfg.SOLVER.AMP.ENABLED:
        return None, encoder_dtype is torch.float16
    if encoder_dtype is None and cfg.MODEL.DEVICE == "cpu":
        logger.warning(
            "SOLVER.AMP.ENABLED: Detectron2's default, float16, is very slow on a CPU, so training is in float32; set "
            "MODEL.SPAR.PRECISION to choose another precision"
        )
        return None, False
    # Detectron2's mixed precision uses float16 by default.
    model_dtype = encoder_dtype or torch.float16
    return model_dtype, model_dtype is torch.float16
