"""Disk cache of teacher targets."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spar_d2.teacher.keys import Teacher, image_key, pixel_checksum, teacher_key, tensor_checksum
from spar_d2.utils.io import atomic_write, remove_leftovers

logger = logging.getLogger(__name__)

# Disk space in bytes that the cache leaves free, so that training can still write checkpoints.
RESERVE = 2 << 30
_NAME = "target"


class TargetCache:
    """Caches the full targets of one teacher, one float16 file per image.

    File names are hashes of the augmented pixels. Folder names are hashes of all properties of the teacher that affect
    its targets. Therefore, targets of other teachers or images are never used. Files are written atomically and contain
    a checksum; corrupt files count as missing. Several runs may share a folder.

    If the disk is full or the folder is not writable, one warning is logged, and the cache becomes read-only.

    Args:
        folder: cache folder; created if it does not exist.
        teacher: teacher whose targets are cached.

    Attributes:
        folder: subfolder of this teacher.
        hits, misses: numbers of cache hits and misses.
        writable: whether the cache is writable.

    Raises:
        ValueError: ``folder`` is a file or cannot be created.
    """

    def __init__(self, folder: str | os.PathLike, teacher: Teacher) -> None:
        self.teacher = teacher
        self.identity = teacher_key(teacher)
        self.folder = Path(folder) / self.identity
        self.hits = self.misses = 0
        self.writable = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not Path(folder).is_dir():
                raise ValueError(
                    f"SPAR.TEACHER.CACHE_DIR must be a folder that can be created and read, got {folder}: {error}"
                ) from error
            self._stop_writing(str(error))
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
        cached = self.read(image, looked_up)
        if cached is not None:
            return cached
        # Encode the image alone, so that rounding does not depend on which other images are cached.
        return self.write(image, self.teacher.targets([image])[0], looked_up)

    def path(self, image: torch.Tensor) -> Path:
        """Return the cache file of an image (3, H, W), normalized for the encoder."""
        return _entry(self.folder, image_key(image, self.teacher.encoder))

    def look_up(self) -> TargetLookUp:
        """Return a function for data loader workers that reads cached targets ahead of training."""
        return TargetLookUp(self.folder, self.identity)

    def read(self, image: torch.Tensor, looked_up: LookedUp | None = None) -> torch.Tensor | None:
        """Return the cached target (1, D, h, w) float32 on the device of the image, or None if missing or corrupt."""
        target = load_target(self.path(image), self.identity) if looked_up is None else looked_up.target
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
            path = self.path(image) if looked_up is None else _entry(self.folder, looked_up.key)
            self._store(path, stored.cpu().contiguous())
        return stored.float()

    def _store(self, path: Path, stored: torch.Tensor) -> None:
        metadata = {"teacher": self.identity, "checksum": tensor_checksum(stored)}
        try:
            free = shutil.disk_usage(self.folder).free
            if free - stored.nbytes < RESERVE:
                self._stop_writing(
                    f"its disk has {free / 2**30:.1f} GiB free, of which {RESERVE / 2**30:.0f} GiB are reserved"
                )
                return
            with atomic_write(path) as temporary:
                save_file({_NAME: stored}, temporary, metadata)
        except (OSError, SafetensorError) as error:
            self._stop_writing(str(error))

    def _stop_writing(self, reason: str) -> None:
        self.writable = False
        logger.warning("SPAR.TEACHER.CACHE_DIR: no longer writing to %s: %s", self.folder, reason)


class LookedUp(NamedTuple):
    """Result of a cache lookup.

    Attributes:
        key: cache key of the image.
        target: (1, D, h, w) on the CPU, usually float16; None on a cache miss.
    """

    key: str
    target: torch.Tensor | None


class TargetLookUp:
    """Reads cached targets in data loader workers, so that training does not wait for the disk.

    Args:
        folder: cache folder of one teacher.
        identity: cache key of the teacher.
    """

    # Key in dataset dicts.
    NAME = "looked_up_target"

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def __call__(self, pixels: torch.Tensor) -> dict[str, LookedUp]:
        """Look up the target of an image.

        Args:
            pixels: (3, H, W) uint8 RGB.

        Returns:
            An entry for the dataset dict of the image.
        """
        key = pixel_checksum(pixels)
        return {self.NAME: LookedUp(key, load_target(_entry(self._folder, key), self._identity))}


def _entry(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def load_target(path: Path, identity: str) -> torch.Tensor | None:
    """Load a target (1, D, h, w) in its stored dtype. Returns None if it is missing or, with a warning, corrupt."""
    try:
        with safe_open(path, "pt") as file:
            metadata, target = file.metadata() or {}, file.get_tensor(_NAME)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("Cached target %s cannot be read and will be recomputed: %s", path, error)
        return None
    if metadata != {"teacher": identity, "checksum": tensor_checksum(target)}:
        logger.warning("Cached target %s is corrupt and will be recomputed", path)
        return None
    return target
