"""What an evaluation has done so far, on disk, so that one that is stopped goes on from there."""

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
    """Counts and times of the images done, in a file.

    Args:
        path: the file; it is there while the evaluation is unfinished.
        identity: text that says what is evaluated and how; what was kept of another is not gone on from.
        period: seconds between writes.
    """

    def __init__(self, path: Path, identity: str, period: float = 20.0) -> None:
        self.path, self.identity, self.period = path, identity, period
        self._written = time.monotonic()

    def restore(self, evaluator: SemanticEvaluator) -> list[float]:
        """Give the evaluator what it had counted; returns the seconds of each image that it had seen."""
        if not self.path.is_file():
            return []
        try:
            with safe_open(self.path, "np") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    return []
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            seconds = state.pop("seconds").tolist()
            evaluator.load_state_dict(state)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s is damaged (%s); beginning anew", self.path, error)
            return []
        logger.info("Going on after %d images (%s)", len(seconds), self.path)
        return seconds

    def keep(self, evaluator: SemanticEvaluator, seconds: list[float], now: bool = False) -> None:
        """Write what was done, if it is time to, or at once."""
        if not now and time.monotonic() - self._written < self.period:
            return
        state = {"seconds": np.asarray(seconds), **evaluator.state_dict()}
        with atomic_write(self.path) as temporary:
            save_file(state, temporary, {"identity": self.identity})
        self._written = time.monotonic()

    def finish(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
