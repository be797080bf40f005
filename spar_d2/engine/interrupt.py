"""Graceful shutdown on SIGINT."""

from __future__ import annotations

import logging
import os
import signal

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

from spar_d2.distillation.readings import PERIOD

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Raised when the user stops training, after a checkpoint was written."""


class StopOnInterrupt(HookBase):
    """On Ctrl-C, finishes the step, writes a checkpoint, and stops. A second Ctrl-C stops immediately.

    With several processes, they agree every ``PERIOD`` steps whether to stop.

    Args:
        checkpointer: checkpointer that writes the checkpoint for ``--resume``.

    Raises:
        Interrupted: raised in the training loop to stop it.
    """

    def __init__(self, checkpointer: DetectionCheckpointer) -> None:
        self.checkpointer = checkpointer
        self.requested = False
        self._process = os.getpid()
        self._previous = None

    def before_train(self) -> None:
        self.requested = False
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # signal handlers can only be set in the main thread
            self._previous = None

    def after_train(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def after_step(self) -> None:
        if not self._is_requested_anywhere():
            return
        self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        raise Interrupted(f"stopped after iteration {self.trainer.iter}; use --resume to continue")

    def _is_requested_anywhere(self) -> bool:
        """Return whether any process was asked to stop, so that all processes stop together."""
        number = self.trainer.iter + 1
        if comm.get_world_size() > 1 and number % PERIOD and number < self.trainer.max_iter:
            return False
        return any(comm.all_gather(self.requested))

    def _request(self, number: int, frame) -> None:
        if os.getpid() != self._process:
            return  # forked data loader workers end with the training
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        when = "after this step" if comm.get_world_size() == 1 else f"within {PERIOD} steps"
        logger.warning("Stopping %s; press Ctrl-C again to stop immediately, without a checkpoint.", when)
