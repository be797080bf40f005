"""Speed of image loading, compared with training."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from PIL import Image

from benchmarks.tables import Table
from spar_d2.data.build import build_photo_loader
from spar_d2.data.loaders import AHEAD
from spar_d2.engine.interrupt import Interrupted
from spar_d2.engine.trainer import Trainer

TABLE = Table(
    {
        "worker processes": lambda m: str(m.workers),
        "images per step": lambda m: str(m.batch),
        "loading alone, images/s": lambda m: f"{m.alone:.1f}",
        "training, images/s": lambda m: f"{m.training:.2f}",
        "waiting for images": lambda m: f"{100 * m.waiting:.1f} %",
    },
    left=0,
)


@dataclass(frozen=True)
class Loading:
    """Measurement for a number of worker processes.

    Attributes:
        workers: number of worker processes; 0 loads in the main process.
        batch: images per step.
        alone: images per second without a model.
        training: images per second in training.
        waiting: fraction of the training time that is spent waiting for images, 0..1.
    """

    workers: int
    batch: int
    alone: float
    training: float
    waiting: float


class _Times(HookBase):
    """Measures the time of each step, and stops the training before it exports a student."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.steps: list[float] = []

    def before_step(self) -> None:
        self._started = time.perf_counter()

    def after_step(self) -> None:
        self.steps.append(time.perf_counter() - self._started)
        self.left -= 1
        if not self.left:
            raise Interrupted("ended")


def measure_loading(cfg: CfgNode, workers: int, steps: int, hooks: Sequence[HookBase] = ()) -> Loading:
    """Measure loading and training for some steps. The first step is a warm-up.

    Args:
        cfg: distillation config.
        workers: number of worker processes.
        steps: number of steps, at least 2.
        hooks: additional training hooks.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = workers, steps + 1, ()
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SPAR.PICTURE_PERIOD = steps + 2, 0
    batches = iter(build_photo_loader(cfg, seed=0))
    next(batches)
    prefetched = AHEAD * workers
    for _ in itertools.islice(batches, prefetched):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(batches, prefetched + steps):
        pass
    alone = (prefetched + steps) * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - started)
    del batches
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        trainer, times = Trainer(cfg), _Times(steps)
        trainer.register_hooks([*hooks, times])
        trainer.train()
    # On a GPU, the metrics of several steps are written at once, the last ones after training.
    waiting = [value for value, _ in trainer.storage.history("data_time").values()]
    seconds = sum(times.steps[1:])
    images = (steps - 1) * cfg.SOLVER.IMS_PER_BATCH
    return Loading(workers, cfg.SOLVER.IMS_PER_BATCH, alone, images / seconds, sum(waiting[1:]) / seconds)


def draw_photos(folder: Path, count: int, size: tuple[int, int] = (2250, 1500)) -> Iterator[Path]:
    """Write synthetic JPEGs with structure at all scales, which take about as long to decode as real images."""
    width, height = size
    for number in range(count):
        generator = np.random.default_rng(number)
        total = np.zeros((height, width, 3), dtype=np.float32)
        for cells in (4, 16, 64, 256):
            noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 4
        total += generator.normal(0, 6, total.shape)
        path = folder / f"{number:04d}.jpg"
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        yield path
