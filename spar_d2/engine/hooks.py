"""Small trainer hooks: a progress bar, stopping well, writing the student."""

from __future__ import annotations

import logging
import os
import signal
import time

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm
from tqdm import tqdm

from spar_d2.encoders import EncoderSpec, find_encoder
from spar_d2.engine.checkpoint import export_student

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user, after a checkpoint was written."""


class StopOnInterrupt(HookBase):
    """On Ctrl-C, finish the step, write a checkpoint, and stop; on a second one, stop at once.

    Args:
        checkpointer: writes the checkpoint that ``--resume`` continues from.

    Raises:
        Interrupted: out of the training loop, when it stops.
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
        except ValueError:  # only the main thread of a process may; elsewhere Ctrl-C works as usual
            self._previous = None

    def after_train(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def after_step(self) -> None:
        # One process may have seen the signal a step before the others: stop together.
        if not any(comm.all_gather(self.requested)):
            return
        self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        raise Interrupted(f"stopped after iteration {self.trainer.iter}; --resume goes on from there")

    def _request(self, number: int, frame) -> None:
        if os.getpid() != self._process:
            return  # a forked data-loading worker: it ends with the training
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("Stopping after this step; Ctrl-C again stops at once, without a checkpoint.")


class ProgressBar(HookBase):
    """Iterations, loss and time left on one line of a terminal; nothing where the output is no terminal."""

    def before_train(self) -> None:
        trainer = self.trainer
        options = {"total": trainer.max_iter, "initial": trainer.start_iter, "desc": "training"}
        # None: shown on terminals only. Log files have Detectron2's own lines.
        self._bar = tqdm(**options, disable=None, dynamic_ncols=True)

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        if "total_loss" in latest:
            self._bar.set_postfix(loss=f"{latest['total_loss'][0]:.4f}", refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        self._bar.close()


class StudentWriter(HookBase):
    """Writes the student to a file of its own when training is complete.

    Args:
        spec: what the encoder was built from.
        path: file to write, see :func:`export_student`.
    """

    def __init__(self, spec: EncoderSpec, path: str | os.PathLike) -> None:
        self.spec, self.path = spec, path

    def after_train(self) -> None:
        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            export_student(find_encoder(self.trainer.model), self.spec, self.path)


class StepTimer(HookBase):
    """Seconds spent in steps, in ``seconds``: training alone, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def before_step(self) -> None:
        self._started = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._started
