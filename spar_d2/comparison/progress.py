"""Stores intermediate results of an evaluation on disk, so that it can be resumed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch

from spar_d2.evaluation import SemanticEvaluator
from spar_d2.utils.content_cache import ContentCache

logger = logging.getLogger(__name__)


class Progress:
    """Stores the counts and run times of processed images in a file.

    Args:
        path: path of the file, which exists while the evaluation is unfinished.
        identity: cache key of the evaluation; progress of another evaluation is ignored.
        period: minimum number of seconds between writes.
    """

    def __init__(self, path: Path, identity: str, period: float = 20.0) -> None:
        self.path, self.period = path, period
        self._files = ContentCache(path.parent, identity=identity)
        self._written = time.monotonic()

    def restore(self, evaluator: SemanticEvaluator) -> list[float]:
        """Restore the evaluator's counts, and return the run times of the processed images."""

        def restored(tensors: dict[str, torch.Tensor]) -> list[float]:
            state = {name: tensor.numpy() for name, tensor in tensors.items()}
            seconds = state.pop("seconds").tolist()
            evaluator.load_state_dict(state)
            logger.info("Resuming after %d images (%s)", len(seconds), self.path)
            return seconds

        return self._files.load(self.path.name, restored) or []

    def keep(self, evaluator: SemanticEvaluator, seconds: list[float], now: bool = False) -> None:
        """Write the progress if ``period`` has passed, or if ``now`` is set."""
        if not now and time.monotonic() - self._written < self.period:
            return
        state = {"seconds": np.asarray(seconds), **evaluator.state_dict()}
        self._files.save(self.path.name, {name: torch.as_tensor(values) for name, values in state.items()})
        self._written = time.monotonic()

    def finish(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
