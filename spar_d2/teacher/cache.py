"""Disk cache of teacher targets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from spar_d2.teacher.dense_teacher import DenseTeacher
from spar_d2.teacher.keys import Normalization, image_key, pixel_checksum, teacher_key
from spar_d2.utils.content_cache import ContentCache, digest
from spar_d2.utils.io import remove_leftovers

# Disk space in bytes that the cache leaves free, so that training can still write checkpoints.
RESERVE = 2 << 30
_NAME = "target"


class TargetCache(ContentCache):
    """Caches the full targets of one teacher, one float16 file per image.

    File names are hashes of the augmented pixels. Folder names are hashes of all properties of the teacher that affect
    its targets. Therefore, targets of other teachers or images are never used. Files are written atomically and contain
    a checksum; corrupt files count as missing. Several runs may share a folder.

    If the disk is full or the folder is not writable, one warning is logged, and the cache becomes read-only.

    Args:
        folder: cache folder; created if it does not exist.
        teacher: teacher whose targets are cached.
        normalization: pixel statistics of the images; None for those of ``teacher.encoder``.

    Attributes:
        folder: subfolder of this teacher.
        normalization: pixel statistics of the images.
        hits, misses: numbers of cache hits and misses.

    Raises:
        ValueError: ``folder`` is a file or cannot be created, the teacher has no identity, or the normalization is
            unknown.
    """

    KEY = "SPAR.TEACHER.CACHE_DIR"

    def __init__(
        self, folder: str | os.PathLike, teacher: DenseTeacher, normalization: Normalization | None = None
    ) -> None:
        self.teacher = teacher
        identity = teacher_key(teacher)
        encoder = getattr(teacher, "encoder", None)
        if normalization is None and encoder is None:
            raise ValueError(f"normalization must be given for {type(teacher).__name__}, which has no encoder")
        self.normalization: Normalization = normalization or cast(Any, encoder)
        statistics = _statistics(self.normalization)
        if encoder is None or _statistics(encoder) != statistics:
            identity = digest(identity, str(statistics))[:32]
        super().__init__(Path(folder) / identity, self.KEY, RESERVE, teacher=identity)
        self.hits = self.misses = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not Path(folder).is_dir():
                raise ValueError(f"{self.KEY} must be a folder that can be created, got {folder}: {error}") from error
            self.stop_writing(str(error))
        remove_leftovers(self.folder)

    def target(self, image: torch.Tensor, looked_up: LookedUp | None = None) -> torch.Tensor:
        """Return the target of an image. On a cache miss, compute and store it.

        Args:
            image: (3, H, W), normalized for the encoder.
            looked_up: result of :class:`TargetLookUp` for the image, if available.

        Returns:
            (1, D, h, w) float32.

        Raises:
            FloatingPointError: the target has NaN or infinite values.
        """
        looked_up = looked_up or self.entry(image)
        cached = self.read(image, looked_up)
        if cached is not None:
            return cached
        # Encode the image alone, so that rounding does not depend on which other images are cached.
        return self.write(image, self.teacher.targets([image])[0], looked_up)

    def entry(self, image: torch.Tensor) -> LookedUp:
        """Look up the target of an image (3, H, W), normalized for the encoder."""
        return _look_up(self, image_key(image, self.normalization))

    def path(self, image: torch.Tensor) -> Path:
        """Return the cache file of an image (3, H, W), normalized for the encoder."""
        return self.folder / target_file(image_key(image, self.normalization))

    def look_up(self) -> TargetLookUp:
        """Return a function for data loader workers that reads cached targets ahead of training."""
        return TargetLookUp(self.folder, self.key, 0, **self.metadata)

    def read(self, image: torch.Tensor, looked_up: LookedUp | None = None) -> torch.Tensor | None:
        """Return the cached target (1, D, h, w) float32 on the device of the image, or None if missing or corrupt."""
        target = (looked_up or self.entry(image)).target
        if target is None:
            self.misses += 1
            return None
        self.hits += 1
        return target.to(image.device, non_blocking=True).float()

    def write(self, image: torch.Tensor, target: torch.Tensor, looked_up: LookedUp | None = None) -> torch.Tensor:
        """Store the target (1, D, h, w) of an image, and return it as :meth:`read` will return it.

        Raises:
            FloatingPointError: the target has NaN or infinite values.
        """
        if not target.isfinite().all():
            raise FloatingPointError("the teacher's features are NaN or infinite")
        half = target.half()
        # Targets that exceed the range of float16 are stored in float32.
        stored = half if half.isfinite().all() else target
        if self.writable:
            key = looked_up.key if looked_up else image_key(image, self.normalization)
            self.try_save(target_file(key), {_NAME: stored.cpu().contiguous()})
        return stored.float()


class LookedUp(NamedTuple):
    """Result of a cache lookup.

    Attributes:
        key: cache key of the image.
        target: (1, D, h, w) on the CPU, usually float16; None on a cache miss.
    """

    key: str
    target: torch.Tensor | None


class TargetLookUp(ContentCache):
    """Reads cached targets in data loader workers, so that training does not wait for the disk."""

    # Key in dataset dicts.
    NAME = "looked_up_target"

    def __call__(self, pixels: torch.Tensor) -> dict[str, LookedUp]:
        """Return the lookup of an image (3, H, W) uint8 RGB, as an entry for its dataset dict."""
        return {self.NAME: _look_up(self, pixel_checksum(pixels))}


def _look_up(files: ContentCache, key: str) -> LookedUp:
    return LookedUp(key, files.load(target_file(key), lambda tensors: tensors[_NAME]))


def _statistics(normalization: Normalization) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(normalization.pixel_mean), tuple(normalization.pixel_std)


def target_file(key: str) -> str:
    """Return the file of a cache key, relative to the folder of a teacher."""
    return f"{key[:2]}/{key}.safetensors"
