"""Loaders of training images, with a common interface for the trainer."""

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

# Batches that each worker process prefetches.
AHEAD = 4


class TrainLoader(Protocol):
    """Infinite loader of dataset dict batches for one process."""

    @property
    def photos(self) -> PhotoDataset | None:
        """Data set of unlabeled images, or None for labeled images."""
        ...

    def __iter__(self) -> Iterator[list[dict]]: ...

    def set_seed(self, seed: int) -> None:
        """Change the random seed. Must be called before the first batch."""
        ...

    def start_at(self, step: int) -> None:
        """Start at another step than the first."""
        ...


class CorruptImages:
    """Counts corrupt images and logs each of them once.

    Args:
        limit: maximum number of corrupt images.

    Attributes:
        names: file names of the corrupt images so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: set[str] = set()

    def add(self, damaged: Mapping[str, str]) -> None:
        """Add images.

        Args:
            damaged: reason for each corrupt image, by file name.

        Raises:
            RuntimeError: there are more corrupt images than the limit.
        """
        for name, reason in damaged.items():
            if name in self.names:
                continue
            self.names.add(name)
            # File names may contain newlines and invalid UTF-8.
            shown = reason.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
            logger.warning("Skipped a corrupt image (%d so far): %s", len(self.names), shown)
            if len(self.names) > self.limit:
                raise RuntimeError(
                    f"more than {self.limit} images are corrupt (SPAR.DATA.MAX_DAMAGED), the last one: {shown}; "
                    "see the log for all of them"
                )


class PhotoLoader:
    """Loads unlabeled images in the order of a sampler. Corrupt images are logged once and skipped.

    Args:
        photos: data set of images.
        sampler: sampler of batches.
        workers: number of worker processes; 0 loads in the main process.
        max_damaged: maximum number of corrupt images.

    Attributes:
        corrupt: corrupt images so far.
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
        """Yield batches infinitely; raises ``RuntimeError`` if too many images are corrupt."""
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
    """Wraps a Detectron2 loader of labeled images.

    Args:
        batches: Detectron2's loader.
        sampler: sampler of the loader, or None for Detectron2's samplers, which cannot be resumed.
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
