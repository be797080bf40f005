"""Infinite samplers that can resume at any step, because the order of images depends only on the seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from detectron2.data.samplers import TrainingSampler
from torch.utils.data import Sampler


class SampleIndex(NamedTuple):
    """A sample of a training run.

    Attributes:
        position: index of the sample in the run, counted across all epochs and processes.
        epoch: number of completed passes over the data set.
        index: index of the image in the data set.
    """

    position: int
    epoch: int
    index: int


class ResumableBatchSampler(Sampler[list[SampleIndex]]):
    """Yields the batches of one process without end; the images are shuffled in every epoch.

    Batch ``i`` of the run has the samples ``i * batch_size`` to ``(i + 1) * batch_size - 1``, which are divided among
    the processes in order. Therefore, the step is enough to resume a run, and the images of a batch do not depend on
    the number of processes and workers.

    Args:
        size: number of images.
        batch_size: total batch size of all processes.
        seed: random seed of the sampling order.
        rank, world_size: rank of this process and number of processes.

    Attributes:
        start: index of the first batch to yield; greater than 0 in a resumed run.

    Raises:
        ValueError: there are no images, or the batch size is not a multiple of the number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if size < 1:
            raise ValueError("there are no images to train on")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of the number of processes {world_size}, got {batch_size}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start = 0

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        share = self.batch_size // self.world_size
        first = self.start * self.batch_size + self.rank * share
        while True:
            yield [self.sample(position) for position in range(first, first + share)]
            first += self.batch_size

    def sample(self, position: int) -> SampleIndex:
        """Return the sample at a position of the run."""
        epoch, offset = divmod(position, self.size)
        return SampleIndex(position, epoch, int(self._order(epoch)[offset]))

    def _order(self, epoch: int) -> torch.Tensor:
        if getattr(self, "_epoch", None) != (epoch, self.seed):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = (epoch, self.seed), torch.randperm(self.size, generator=generator)
        return self._permutation


class ResumableTrainingSampler(TrainingSampler):
    """Detectron2's training sampler, which can also resume at any step.

    Args:
        size: number of images.
        batch_size: total batch size of all processes.
        seed: random seed of the sampling order.

    Attributes:
        start: step of the first image to yield; greater than 0 in a resumed run.
        generator: generator of the seeds of the data loader workers. It depends on ``start``.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        super().__init__(size, seed=seed)
        self.batch_size, self.start = batch_size, 0
        self.generator = torch.Generator()
        self.start_at(0)

    def set_seed(self, seed: int) -> None:
        """Change the seed. Must be called before the first image is drawn."""
        self._seed = seed

    def start_at(self, step: int) -> None:
        """Skip the images of all steps before ``step``."""
        self.start = step
        self.generator.manual_seed(self._seed * 1_000_003 + step)

    def __iter__(self) -> Iterator[int]:
        first = self._rank + self.start * self.batch_size
        yield from itertools.islice(self._infinite_indices(), first, None, self._world_size)
