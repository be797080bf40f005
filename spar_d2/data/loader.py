"""Batches of photos for a trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import DataLoader

from spar_d2.data.photos import PhotoDataset
from spar_d2.data.samplers import DrawSampler

logger = logging.getLogger(__name__)

# Batches that each loading process reads ahead.
AHEAD = 4


class Damage:
    """Counts damaged photos, and names each once in the log.

    Args:
        most: how many are put up with.

    Attributes:
        names: of the files met so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.names: set[str] = set()

    def add(self, damaged: Mapping[str, str]) -> None:
        """Count photos, given what is wrong with each by its file's name.

        Raises:
            RuntimeError: there are too many.
        """
        for name, reason in damaged.items():
            if name in self.names:
                continue
            self.names.add(name)
            # Names of files need not be text, nor one line.
            shown = reason.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
            logger.warning("Skipped a damaged photo (%d so far): %s", len(self.names), shown)
            if len(self.names) > self.most:
                raise RuntimeError(
                    f"more than {self.most} photos are damaged (SPAR.DATA.MAX_DAMAGED), the last one: {shown}; "
                    "all are named in the log"
                )


class PhotoLoader:
    """Loads photos in the sampler's order, and keeps count of those that are damaged.

    Each damaged photo is named once in the log.

    Args:
        dataset: the photos.
        sampler: draws them.
        workers: processes that read and augment, beside this one; 0 for none.
        max_damaged: damaged photos that are put up with.

    Attributes:
        damage: the damaged photos met so far.
    """

    def __init__(self, dataset: PhotoDataset, sampler: DrawSampler, workers: int = 0, max_damaged: int = 100) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.workers = workers
        self.damage = Damage(max_damaged)

    def __iter__(self) -> Iterator[list[dict]]:
        """Batches of what the dataset gives, without end, from the sampler's ``start`` on.

        Raises:
            RuntimeError: too many damaged photos.
        """
        options = {"prefetch_factor": AHEAD, "persistent_workers": True} if self.workers else {}
        batches = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=as_it_is,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
        for batch in batches:
            for record in batch:
                self.damage.add(record.pop("damaged"))
            yield batch


def as_it_is(batch: object) -> object:
    """Does nothing, in place of stacking images, which have different sizes."""
    return batch
