"""Small trainer hooks: seeds, what is shown, writing the student."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from tqdm import tqdm

from spar_d2.checkpoint.export import export_student
from spar_d2.encoders import EncoderSpec, find_encoder

logger = logging.getLogger(__name__)


class PatientWriter(EventWriter):
    """One of Detectron2's writers; a disk that is full does not stop the training over its metrics.

    Args:
        writer: writes.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._failed = False

    def write(self) -> None:
        self._try(self._writer.write)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._failed:
                logger.error("Metrics cannot be written to OUTPUT_DIR, training goes on without: %s", error)
            self._failed = True


class StepSeed(HookBase):
    """Seeds all random numbers anew before every step, by the run's seed, the iteration and the process.

    So a step draws the same whether the run was resumed before it or not.

    Args:
        run: has the run's ``seed``.
    """

    def __init__(self, run: TrainerBase) -> None:
        self._run = weakref.proxy(run)

    def before_step(self) -> None:
        words = np.random.SeedSequence((self._run.seed, self.trainer.iter, comm.get_rank())).generate_state(2)
        torch.manual_seed(int(words[0]))
        np.random.seed(words[1])
        random.seed(int(words[1]))


class AfterBackward(HookBase):
    """Tells a run's own hooks that the backward pass is done, of which Detectron2 tells only those of its step.

    Args:
        run: has the hooks.
    """

    def __init__(self, run: TrainerBase) -> None:
        self._run = weakref.proxy(run)

    def after_backward(self) -> None:
        self._run.after_backward()


class DistillationPrinter(EventWriter):
    """Writes to the log what Detectron2's own line leaves out: how near the student is, and how fast it goes."""

    _written = -1

    def write(self) -> None:
        storage = get_event_storage()
        latest = max((step for name, (_, step) in storage.latest().items() if name.startswith("distill/")), default=-1)
        if latest <= self._written:
            return
        self._written = latest
        shown = {"cosine": "{:.4f}", "images_per_second": "{:.3g}", "windows_per_second": "{:.4g}"}
        parts = [
            f"{name}: {form.format(storage.history(f'distill/{name}').median(20))}"
            for name, form in shown.items()
            if f"distill/{name}" in storage.histories()
        ]
        logger.info(" iter: %d  %s", latest, "  ".join(parts))


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
        weights: within the context that it gives, the model has the weights to write.
    """

    # Any that has a model.
    trainer: Any

    def __init__(
        self,
        spec: EncoderSpec,
        path: str | os.PathLike,
        weights: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.spec, self.path, self.weights = spec, path, weights

    def after_train(self) -> None:
        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            with self.weights():
                export_student(find_encoder(self.trainer.model), self.spec, self.path)


class StepTimer(HookBase):
    """Seconds spent in steps, in ``seconds``: training alone, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def before_step(self) -> None:
        self._started = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._started
