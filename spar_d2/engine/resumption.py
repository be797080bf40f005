"""Checks whether a config is compatible with the run that it resumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from detectron2.config import CfgNode

from spar_d2.engine.derived_keys import value_at

logger = logging.getLogger(__name__)

# Changing these keys would invalidate the optimizer state.
_FIXED = ("MODEL.SPAR.TRAINABLE", "SPAR.OPTIMIZER", "SPAR.LAYER_DECAY")
# Changing these keys is possible, but the result differs from an uninterrupted run.
_WARNED = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "DATASETS.TRAIN",
    "SPAR.DATA.IMAGES",
    "SPAR.EMA_DECAY",
    "SPAR.TEACHER.KIND",
    "SPAR.TEACHER.BASE",
    "SPAR.TEACHER.ENSEMBLE",
    "SPAR.TEACHER.SINGLE_PASS",
    "SPAR.TEACHER.STRIDE",
    "SPAR.TEACHER.WINDOWS_PER_IMAGE",
)


def settings(cfg: CfgNode) -> dict[str, str]:
    """Return the config values that are stored in checkpoints."""
    return {key: str(value_at(cfg, key)) for key in (*_FIXED, *_WARNED)}


def compare(before: Mapping[str, str], cfg: CfgNode) -> None:
    """Log a warning for config values that differ from those of the resumed run.

    Args:
        before: :func:`settings` stored in the checkpoint.
        cfg: config of this run.

    Raises:
        ValueError: a value differs that must not change.
    """
    changed = {key: value for key, value in settings(cfg).items() if before.get(key, value) != value}
    for key, value in changed.items():
        if key in _FIXED:
            raise ValueError(f"--resume: {key} was {before[key]!r} in this run and cannot be changed to {value!r}")
        logger.warning("--resume: %s was changed from %s to %s", key, before[key], value)
