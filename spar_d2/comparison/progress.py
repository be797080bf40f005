"""Stores intermediate results of an evaluation on disk, so that it can be resumed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spar_d2.evaluation import SemanticEvaluator
from spar_d2.utils.io import atomic_write

logger = logging.getLogger(__name__)


class Progress:
    """Stores the counts and run times of processed images in a file.

    Args:
        path: path of the file, which exists while the evaluation is unfinished.
        identity: cache key of the evaluation; progress of another evaluation is ignored.
        period: minimum number of seconds between writes.
    """

    def __init__(self, path: Path, identity: str, period: float = 20.0) -> None:
        self.path, self.identity, self.period = path, identity, period
        self._written = time.monotonic()

    def restore(self, evaluator: SemanticEvaluator) -> list[float]:
        """Restore the evaluator's counts, and return the run times of the processed images."""
        if not self.path.is_file():
            return []
        try:
            with safe_open(self.path, "np") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    return []
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            seconds = state.pop("seconds").tolist()
            evaluator.load_state_dict(state)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s is corrupt (%s); starting over", self.path, error)
            return []
        logger.info("Resuming after %d images (%s)", len(seconds), self.path)
        return seconds

    def keep(self, evaluator: SemanticEvaluator, seconds: list[float], now: bool = False) -> None:
        """Write the progress if ``period`` has passed, or if ``now`` is set."""
        if not now and time.monotonic() - self._written < self.period:
            return
        state = {"seconds": np.asarray(seconds), **evaluator.state_dict()}
        with atomic_write(self.path) as temporary:
            save_file(state, temporary, {"identity": self.identity})
        self._written = time.monotonic()

    def finish(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
