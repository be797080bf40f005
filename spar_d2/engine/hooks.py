"""Trainer hooks for seeds, logging, progress bars and the export of the student."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
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
    """Wrapper of an event writer that ignores I/O errors, so that a full disk does not stop training.

    Args:
        writer: event writer to wrap.
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
                logger.error("Failed to write metrics to OUTPUT_DIR; training continues without them: %s", error)
            self._failed = True


class StepSeed(HookBase):
    """Seeds all random number generators before each step, from the seed of the run, the iteration and the rank.

    Thus, a resumed run uses the same random numbers as an uninterrupted one.

    Args:
        run: trainer with the attribute ``seed``.
    """

    def __init__(self, run: TrainerBase) -> None:
        self._run = weakref.proxy(run)

    def before_step(self) -> None:
        seeds = np.random.SeedSequence((self._run.seed, self.trainer.iter, comm.get_rank())).generate_state(2)
        torch.manual_seed(int(seeds[0]))
        np.random.seed(seeds[1])
        random.seed(int(seeds[1]))


class AfterBackward(HookBase):
    """Calls ``after_backward`` of the hooks of a ``DefaultTrainer``; Detectron2 calls it only for its inner trainer.

    Args:
        run: trainer whose hooks are called.
    """

    def __init__(self, run: TrainerBase) -> None:
        self._run = weakref.proxy(run)

    def after_backward(self) -> None:
        self._run.after_backward()


class DistillationPrinter(EventWriter):
    """Logs the distillation metrics, which Detectron2's printer omits: cosine similarity and throughput."""

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
    """Progress bar with iterations, loss and remaining time; shown on terminals only."""

    def before_train(self) -> None:
        trainer = self.trainer
        options = {"total": trainer.max_iter, "initial": trainer.start_iter, "desc": "training"}
        # disable=None: show the bar on terminals only.
        self._bar = tqdm(**options, disable=None, dynamic_ncols=True)

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        if "total_loss" in latest:
            self._bar.set_postfix(loss=f"{latest['total_loss'][0]:.4f}", refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        self._bar.close()


class TimeEstimate(HookBase):
    """Logs the remaining time after a few steps, long before the first regular log line of a slow training."""

    _AFTER = (3, 10)

    def before_train(self) -> None:
        self._done = 0

    def before_step(self) -> None:
        # The first step includes the start of the worker processes.
        if self._done == 1:
            self._since = time.perf_counter()

    def after_step(self) -> None:
        self._done += 1
        if self._done in self._AFTER:
            each = (time.perf_counter() - self._since) / (self._done - 1)
            left = self.trainer.max_iter - self.trainer.iter - 1
            remaining = datetime.timedelta(seconds=round(each * left))
            logger.info("Step %d: %.3g s per step, about %s left", self.trainer.iter + 1, each, remaining)


class StudentWriter(HookBase):
    """Exports the student when training is complete.

    Args:
        spec: specification from which the encoder was built.
        path: output file, see :func:`export_student`.
        weights: function that returns a context manager in which the model has the weights to write.
    """

    # Any trainer with a model.
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
            encoder = find_encoder(self.trainer.model)
            if encoder.origin:
                encoder.origin = dataclasses.replace(encoder.origin, steps=self.trainer.max_iter)
            with self.weights():
                export_student(encoder, self.spec, self.path)


class StepTimer(HookBase):
    """Measures the time spent in training steps, without evaluation and checkpoints, in ``seconds``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def before_step(self) -> None:
        self._started = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._started
