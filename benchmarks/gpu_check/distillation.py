"""Distillation with the ``sampled`` recipes and random weights: speed, memory and host synchronizations."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.data_loading import Loading, draw_photos, measure_loading
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import ROOT, Settings
from benchmarks.gpu_check.watch import StepWatch
from benchmarks.tables import Table, number
from spar_d2.engine.setup import load_config

# Ten epochs of the paper's 25,000 images.
_RUN_IMAGES = 250_000


@dataclass(frozen=True)
class Distillation:
    """A short training.

    Attributes:
        recipe: name of the config file.
        encoder, precision: encoder and precision of the config.
        loading: images per second with and without the model, and the fraction of time spent waiting for images.
        windows: teacher windows per second.
        teacher, student: seconds per step for the teacher's windows, and for the student's forward pass.
        frozen: seconds for the student's frozen part alone.
        step: seconds per step.
        peak: peak memory of tensors in bytes; None on a CPU.
        waits: number of synchronizations per step; None on a CPU.
        places: number of synchronizations by source location.
    """

    recipe: str
    encoder: str
    precision: str
    loading: Loading
    windows: float
    teacher: float
    student: float
    frozen: float
    step: float
    peak: int | None
    waits: float | None
    places: dict[str, int]


TABLE = Table(
    columns={
        "encoder": lambda d: Path(d.encoder).stem,
        "precision": lambda d: d.precision,
        "images a step": lambda d: str(d.loading.batch),
        "images/s": lambda d: number(d.loading.training),
        "windows/s": lambda d: number(d.windows),
        "step ms": lambda d: number(d.step, 1e-3),
        "teacher ms": lambda d: number(d.teacher, 1e-3),
        "student forward ms": lambda d: number(d.student, 1e-3),
        "frozen part ms": lambda d: number(d.frozen, 1e-3),
        "waiting for images": lambda d: f"{100 * d.loading.waiting:.1f} %",
        "loading alone, images/s": lambda d: number(d.loading.alone),
        "host waits a step": lambda d: number(d.waits),
        "peak GiB": lambda d: number(d.peak, 2**30),
        "hours to 25k x 10": lambda d: number(_RUN_IMAGES / d.loading.training, 3600),
    },
    always=(
        "The `sampled` recipe with random weights, on synthetic JPEGs; including optimizer and loading.",
        "teacher, student forward: per step, by the device's clock; frozen part: embedding and frozen blocks of the "
        "student alone, for the last images; the rest of a step is backward, update and waiting.",
        "hours to 25k x 10: for 250,000 images at this rate.",
    ),
    sometimes={
        '"-" under host waits and peak: only available on a GPU.': lambda d: d.waits is None,
    },
)


def measure_distillations(record: Record, settings: Settings) -> None:
    """Train for a few steps with every recipe and batch size."""
    with tempfile.TemporaryDirectory() as folder:
        list(draw_photos(Path(folder), settings.photos, settings.photo_size))
        for batch in settings.images_a_step:
            for recipe in settings.recipes:
                found = _measure(settings, recipe, batch, folder)
                record.add(f"Distillation, {found.loading.workers} loading processes", TABLE, found)


def _measure(settings: Settings, recipe: str, batch: int, photos: str) -> Distillation:
    overrides = {
        "MODEL.DEVICE": settings.device.type,
        "MODEL.SPAR.PRETRAINED": "",
        "SPAR.DATA.IMAGES": photos,
        "SOLVER.IMS_PER_BATCH": batch,
        "SEED": 0,
    }
    pairs = [item for pair in overrides.items() for item in pair]
    cfg = load_config(str(ROOT / "configs" / recipe), [*pairs, *settings.recipe_overrides])
    watch = StepWatch(settings.device)
    on_gpu = settings.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(settings.device)
    workers = min(settings.workers, os.cpu_count() or 1)
    loading = measure_loading(cfg, workers, settings.steps, [watch])
    steps = max(1, watch.steps)
    images = steps * batch
    teacher, student = watch.seconds()
    return Distillation(
        Path(recipe).stem,
        cfg.MODEL.SPAR.ENCODER,
        cfg.MODEL.SPAR.PRECISION,
        loading,
        windows=watch.windows / images * loading.training,
        teacher=teacher,
        student=student,
        frozen=watch.frozen,
        step=batch / loading.training,
        peak=torch.cuda.max_memory_allocated(settings.device) if on_gpu else None,
        waits=sum(watch.waits.places.values()) / steps if on_gpu else None,
        places=dict(watch.waits.places),
    )
