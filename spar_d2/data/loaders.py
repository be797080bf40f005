"""Loaders of training images, with one interface for the trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from detectron2.data.build import trivial_batch_collator
from torch.utils.data import DataLoader

from spar_d2.data.photos import PhotoDataset
from spar_d2.data.samplers import ResumableBatchSampler, ResumableTrainingSampler

logger = logging.getLogger(__name__)

# Batches that each loading process reads ahead.
AHEAD = 4


class TrainLoader(Protocol):
    """Infinite batches of dataset dicts, for one process."""

    @property
    def photos(self) -> PhotoDataset | None:
        """The unlabeled images that are loaded; None for labeled ones."""
        ...

    def __iter__(self) -> Iterator[list[dict]]: ...

    def set_seed(self, seed: int) -> None:
        """Change the random seed; only before the first batch."""
        ...

    def start_at(self, step: int) -> None:
        """Begin with a step other than the first."""
        ...


class CorruptImages:
    """Counts unreadable images, and logs each once.

    Args:
        limit: number of unreadable images that is tolerated.

    Attributes:
        names: file names so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: set[str] = set()

    def add(self, damaged: Mapping[str, str]) -> None:
        """Count images, given the reason for each by its file name.

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
            if len(self.names) > self.limit:
                raise RuntimeError(
                    f"more than {self.limit} photos are damaged (SPAR.DATA.MAX_DAMAGED), the last one: {shown}; "
                    "all are named in the log"
                )


class PhotoLoader:
    """Loads unlabeled images in the sampler's order; unreadable ones are logged once and skipped.

    Args:
        photos: the images.
        sampler: their order.
        workers: loading processes; 0 loads in this one.
        max_damaged: number of unreadable images that is tolerated.

    Attributes:
        corrupt: unreadable images so far.
    """

    def __init__(
        self, photos: PhotoDataset, sampler: ResumableBatchSampler, workers: int = 0, max_damaged: int = 100
    ) -> None:
        self.photos, self.sampler, self.workers = photos, sampler, workers
        self.corrupt = CorruptImages(max_damaged)

    def set_seed(self, seed: int) -> None:
        self.photos.seed = self.sampler.seed = seed

    def start_at(self, step: int) -> None:
        self.sampler.start = step

    def __iter__(self) -> Iterator[list[dict]]:
        """Batches without end; raises ``RuntimeError`` where too many images are unreadable."""
        options: dict[str, Any] = {"prefetch_factor": AHEAD, "persistent_workers": True} if self.workers else {}
        batches = DataLoader(
            self.photos,
            batch_sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=trivial_batch_collator,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
        for batch in batches:
            for record in batch:
                self.corrupt.add(record.pop("damaged"))
            yield batch


class LabeledLoader:
    """One of Detectron2's loaders of labeled images.

    Args:
        batches: Detectron2's loader.
        sampler: the one that the loader was built with; None for samplers of Detectron2, which cannot be resumed.
    """

    photos = None

    def __init__(self, batches: Iterable[list[dict]], sampler: ResumableTrainingSampler | None) -> None:
        self.batches, self.sampler = batches, sampler

    def set_seed(self, seed: int) -> None:
        if self.sampler is not None:
            self.sampler.set_seed(seed)

    def start_at(self, step: int) -> None:
        if self.sampler is not None:
            self.sampler.start_at(step)

    def __iter__(self) -> Iterator[list[dict]]:
        return iter(self.batches)
