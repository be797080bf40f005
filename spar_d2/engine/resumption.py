"""Whether a config goes on with the run that a checkpoint is of."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from detectron2.config import CfgNode

from spar_d2.engine.setup import value_at

logger = logging.getLogger(__name__)

# With others, the optimizer's state is of no use.
_MUST_STAY = ("MODEL.SPAR.TRAINABLE", "SPAR.OPTIMIZER", "SPAR.LAYER_DECAY")
# With others, the run goes on, but not as if it had not been stopped.
_MATTER = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "DATASETS.TRAIN",
    "SPAR.DATA.IMAGES",
    "SPAR.EMA_DECAY",
    "SPAR.TEACHER.STRIDE",
    "SPAR.TEACHER.WINDOWS_PER_IMAGE",
)


def settings(cfg: CfgNode) -> dict[str, str]:
    """What a checkpoint remembers of its run's config."""
    return {key: str(value_at(cfg, key)) for key in (*_MUST_STAY, *_MATTER)}


def compare(before: Mapping[str, str], cfg: CfgNode) -> None:
    """Name in the log what a config changes of the run that it goes on with.

    Args:
        before: :func:`settings` of the checkpoint.

    Raises:
        ValueError: a change that the run cannot go on with.
    """
    changed = {key: value for key, value in settings(cfg).items() if before.get(key, value) != value}
    for key, value in changed.items():
        if key in _MUST_STAY:
            raise ValueError(f"--resume: {key} was {before[key]!r} in this run and cannot become {value!r}")
        logger.warning("--resume: %s was %s in this run and is %s now", key, before[key], value)
