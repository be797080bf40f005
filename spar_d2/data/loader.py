"""Batches of photos for a trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch.utils.data import DataLoader

from spar_d2.data.photos import PhotoDataset
from spar_d2.data.sampler import DrawSampler

logger = logging.getLogger(__name__)


class PhotoLoader:
    """Loads photos in the sampler's order, and keeps count of those that are damaged.

    Each damaged photo is named once in the log.

    Args:
        dataset: the photos.
        sampler: draws them.
        workers: processes that read and augment, beside this one; 0 for none.
        max_damaged: damaged photos that are put up with.

    Attributes:
        damaged: names of the damaged photos met so far.
    """

    def __init__(self, dataset: PhotoDataset, sampler: DrawSampler, workers: int = 0, max_damaged: int = 100) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.workers, self.max_damaged = workers, max_damaged
        self.damaged: set[str] = set()

    def __iter__(self) -> Iterator[list[dict]]:
        """Batches of what the dataset gives, without end, from the sampler's ``start`` on.

        Raises:
            RuntimeError: too many damaged photos.
        """
        options = {"prefetch_factor": 4, "persistent_workers": True} if self.workers else {}
        batches = DataLoader(
            self.dataset, batch_sampler=self.sampler, num_workers=self.workers, collate_fn=_as_it_is, **options
        )
        for batch in batches:
            for record in batch:
                self._count(record.pop("damaged"))
            yield batch

    def _count(self, damaged: dict[str, str]) -> None:
        for name, reason in damaged.items():
            if name in self.damaged:
                continue
            self.damaged.add(name)
            logger.warning("Skipped a damaged photo (%d so far): %s", len(self.damaged), reason)
            if len(self.damaged) > self.max_damaged:
                raise RuntimeError(
                    f"more than {self.max_damaged} photos are damaged (SPAR.DATA.MAX_DAMAGED), the last one: {reason}; "
                    "all are named in the log"
                )


def _as_it_is(batch: list[dict]) -> list[dict]:
    return batch
