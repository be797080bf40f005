"""In which order photos are trained on: a function of the seed and the position in the run alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One photo of a run.

    Attributes:
        position: number of the draw, over all epochs and processes.
        epoch: how often all photos were drawn before.
        index: number of the photo.
    """

    position: int
    epoch: int
    index: int


class DrawSampler(Sampler[list[Draw]]):
    """Endless batches of draws, shuffled anew in every epoch; those of one of several processes.

    Batch ``i`` of the run is the draws from ``i * batch_size`` on, divided among the processes in order. So a run goes
    on where it stopped by its iteration alone, and any number of processes and workers sees the same photos.

    Args:
        size: how many photos there are.
        batch_size: of all processes together.
        seed: of the order.
        rank, world_size: number of this process and of all.

    Attributes:
        start: batch to begin with.

    Raises:
        ValueError: no photos, or a batch that cannot be divided.
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

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.batch_size // self.world_size
        first = self.start * self.batch_size + self.rank * share
        while True:
            yield [self.draw(position) for position in range(first, first + share)]
            first += self.batch_size

    def draw(self, position: int) -> Draw:
        """The draw at a position of the run."""
        epoch, place = divmod(position, self.size)
        return Draw(position, epoch, int(self._order(epoch)[place]))

    def _order(self, epoch: int) -> torch.Tensor:
        if getattr(self, "_epoch", None) != (epoch, self.seed):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = (epoch, self.seed), torch.randperm(self.size, generator=generator)
        return self._permutation
