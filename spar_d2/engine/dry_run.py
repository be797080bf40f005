"""Estimates the time, memory and disk space of a distillation from a few steps, without writing anything."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from tqdm import tqdm

from spar_d2.data.loaders import TrainLoader
from spar_d2.data.samplers import SampleIndex
from spar_d2.distillation import DistillationHook
from spar_d2.encoders import find_encoder
from spar_d2.engine.checks import check_config, check_sides, mixed_precision
from spar_d2.engine.derived_keys import count_images
from spar_d2.engine.solver import build_optimizer
from spar_d2.engine.train_step import TrainStep
from spar_d2.engine.trainer import Trainer
from spar_d2.teacher import DenseTeacher

# Timed steps, after one step to warm up.
_TIMED = 4
# Images from which the average number of windows is estimated.
_SAMPLED = 32
# Above this number of epochs, a note is printed.
_MANY_EPOCHS = 300


@dataclass(frozen=True)
class Estimate:
    """Estimated costs of a distillation.

    Attributes:
        images: number of images.
        steps, batch: number of steps, and images in each.
        windows, planned: mean number of windows per image that the teacher encodes, and of all windows.
        step_seconds: median time of a step.
        teacher_seconds: time of the teacher for an image.
        seconds: time of the training.
        memory: peak memory in bytes.
        target_bytes: size of the targets of all images.
        checkpoint_bytes: size of a checkpoint.
    """

    images: int
    steps: int
    batch: int
    windows: float
    planned: float
    step_seconds: float
    teacher_seconds: float
    seconds: float
    memory: int
    target_bytes: int
    checkpoint_bytes: int

    @property
    def epochs(self) -> float:
        return self.steps * self.batch / self.images


class _Timer(HookBase):
    """Times steps, the data loader and the teacher, in seconds; the first step is omitted."""

    def __init__(self, teacher: DenseTeacher, bar: tqdm) -> None:
        self.steps: list[float] = []
        self.loading: list[float] = []
        self.teaching: list[float] = []
        self._bar = bar
        for name in ("targets", "samples") if teacher.linear else ("targets",):
            setattr(teacher, name, self._timed(getattr(teacher, name), self.teaching))

    def _timed(self, function: Callable, seconds: list[float]) -> Callable:
        def timed(*arguments: Any) -> Any:
            _synchronize()
            started = time.perf_counter()
            result = function(*arguments)
            _synchronize()
            seconds.append(time.perf_counter() - started)
            return result

        return timed

    def batches(self, loader: TrainLoader) -> Iterator[list[dict]]:
        """Yield the batches of a loader."""
        batches = iter(loader)
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.loading.append(time.perf_counter() - started)
            yield batch

    def before_step(self) -> None:
        if self.trainer.iter == 1:
            for seconds in (self.steps, self.loading, self.teaching):
                seconds.clear()
        self._started = time.perf_counter()

    def after_step(self) -> None:
        _synchronize()
        self.steps.append(time.perf_counter() - self._started)
        self._bar.update()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def estimate(cfg: CfgNode) -> Estimate:
    """Run a few steps of a distillation in this process, and estimate its costs.

    The targets are not cached, and no file is written.

    Raises:
        ValueError: distillation is not enabled, or the config is invalid.
        FileNotFoundError, RuntimeError: as :class:`~spar_d2.engine.trainer.Trainer`.
    """
    if not cfg.SPAR.DISTILL.ENABLED:
        raise ValueError("--dry-run estimates a distillation: SPAR.DISTILL.ENABLED must be True")
    check_config(cfg)
    images = count_images(cfg)
    steps, batch, workers = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS
    caches = bool(cfg.SPAR.TEACHER.CACHE_DIR) and not cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SPAR.TEACHER.CACHE_DIR, cfg.MODEL.SPAR.TEXT_CACHE, cfg.DATALOADER.NUM_WORKERS = "", "", 0
    cfg.SPAR.TEACHER.PROJECTION_IMAGES = 1  # fitted in the first step, which is not timed
    cfg.freeze()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = Trainer.build_model(cfg)
    loader = Trainer.build_train_loader(cfg)
    encoder = find_encoder(model)
    if loader.photos is not None:
        check_sides(cfg, encoder.patch_size)
    hook = cast(Any, DistillationHook)(cfg)
    with contextlib.ExitStack() as stack:
        stack.enter_context(encoder.frozen_blocks_cast())
        bar = stack.enter_context(tqdm(total=1 + _TIMED, desc="timing steps", unit="step", leave=False))
        timer = _Timer(hook.teacher, bar)
        optimizer = build_optimizer(cfg, model)
        batches = cast(Any, timer.batches(loader))
        trainer = TrainStep(model, batches, optimizer, cfg.SPAR.ACCUMULATION_STEPS, *mixed_precision(cfg))
        trainer.register_hooks([hook, timer])
        trainer.train(0, 1 + _TIMED)
    loading = statistics.median(timer.loading)
    # Worker processes load images while the model runs.
    compute = statistics.median(timer.steps) - loading
    step_seconds = max(compute, loading / workers) if workers else compute + loading
    teacher_seconds = sum(timer.teaching) / (_TIMED * batch)
    seconds = step_seconds * steps
    if caches:
        student = max(step_seconds - teacher_seconds * batch, loading / max(1, workers))
        seconds = student * steps + teacher_seconds * min(images, steps * batch)
    sizes = _sizes(loader, trainer)
    sampled = cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE
    planned, windows = (statistics.mean(hook.teacher.cost(*size, w) for size in sizes) for w in (0, sampled))
    cells = statistics.mean(math.prod(encoder.grid(*size)) for size in sizes)
    target_bytes = round(2 * getattr(hook.teacher, "encoder", encoder).embed_dim * cells * images)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    moments = sum(8 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Estimate(
        images, steps, batch, windows, planned, step_seconds, teacher_seconds, seconds, _peak_memory(), target_bytes,
        weights + moments,
    )  # fmt: skip


def _sizes(loader: TrainLoader, trainer: TrainStep) -> list[tuple[int, int]]:
    """Return the sizes of some images in pixels."""
    photos = loader.photos
    if photos is None:
        batch = next(iter(trainer.data_loader))
        return [tuple(record["image"].shape[-2:]) for record in batch]
    chosen = range(0, len(photos), max(1, len(photos) // _SAMPLED))
    return [tuple(photos[SampleIndex(index, 0, index)]["image"].shape[-2:]) for index in chosen]


def _peak_memory() -> int:
    """Return the peak memory in bytes, of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(cfg: CfgNode, costs: Estimate) -> str:
    """Format an estimate for the user."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    source = cfg.SPAR.DATA.IMAGES or ", ".join(cfg.DATASETS.TRAIN)
    hours = costs.seconds / 3600
    shown = f"{hours:.1f} hours" if hours >= 1 else f"{costs.seconds / 60:.1f} minutes"
    step = f"{costs.step_seconds:.3g} s per step, the teacher {costs.teacher_seconds:.3g} s per image"
    windows = f"{costs.windows:.0f} of {costs.planned:.0f} on average"
    lines = [
        ("images", f"{costs.images} in {source}"),
        ("steps", f"{costs.steps} of {costs.batch} images, {costs.epochs:.1f} epochs"),
        ("windows per image", windows),
        ("time", f"about {shown} in one process ({step}; median of {_TIMED} steps on {device})"),
        ("memory", f"{costs.memory / 2**30:.1f} GiB at most in these steps; the largest images may need more"),
        ("disk, cache", _cache_line(cfg, costs)),
        ("disk, checkpoints", _checkpoint_line(cfg, costs)),
    ]
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    if costs.epochs > _MANY_EPOCHS:
        advice = "SPAR.DATA.EPOCHS computes the steps from the number of images (docs/distillation.md)"
        text += f"\nnote: every image is used {costs.epochs:.0f} times; {advice}"
    if cfg.SPAR.DISTILL.FROZEN_OUTPUTS_GIB:
        text += "\nnote: with SPAR.DISTILL.FROZEN_OUTPUTS_GIB, steps after the first epoch are faster"
    return f"{text}\nNothing was written."


def _cache_line(cfg: CfgNode, costs: Estimate) -> str:
    folder = cfg.SPAR.TEACHER.CACHE_DIR
    if not folder:
        return "none (SPAR.TEACHER.CACHE_DIR is empty)"
    if cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE:
        return f"none: with SPAR.TEACHER.WINDOWS_PER_IMAGE, {folder} is only read"
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return f"{costs.target_bytes / 2**30:.2f} GiB for all images in {folder} ({free / 2**30:.1f} GiB free)"


def _checkpoint_line(cfg: CfgNode, costs: Estimate) -> str:
    written = math.ceil(costs.steps / cfg.SOLVER.CHECKPOINT_PERIOD)
    kept = min(written, cfg.SPAR.KEEP_CHECKPOINTS or written)
    size = costs.checkpoint_bytes / 2**30
    return f"about {kept * size:.2f} GiB for {kept} checkpoints in {cfg.OUTPUT_DIR}"
