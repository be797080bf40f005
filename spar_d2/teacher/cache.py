"""Targets kept on disk."""

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

# Left free on the disk, in bytes: a run must still be able to write its checkpoints.
RESERVE = 2 << 30
_NAME = "target"


class TargetCache:
    """Keeps the full targets of one teacher, each in a file of its own, in float16.

    A file's name is made of the pixels that the teacher was given, after augmentation, and its folder's of everything
    about the teacher that its targets depend on; so a target of another teacher or image is never found. Files appear
    when they are complete, carry a checksum, and are taken as missing when they are damaged. Any number of runs may
    share a folder.

    A disk that fills up, or a folder that cannot be written to, is reported once; from then on the cache is only read.

    Args:
        folder: of the cache; made if it is not there.
        teacher: whose targets are kept.

    Attributes:
        folder: those of this teacher.
        hits, misses: how many targets were found, and how many were not.
        writable: whether targets are still written.

    Raises:
        ValueError: ``folder`` is a file, or cannot be made.
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
                    f"SPAR.TEACHER.CACHE_DIR must be a folder that can be made and read, got {folder}: {error}"
                ) from error
            self._stop_writing(str(error))
        remove_leftovers(self.folder)

    def target(self, image: torch.Tensor, looked_up: LookedUp | None = None) -> torch.Tensor:
        """The target (1, D, h, w) float32 of an image (3, H, W), read, or else computed and kept.

        Args:
            image: as the encoder takes it.
            looked_up: what :class:`TargetLookUp` found for it, if it was asked.

        Raises:
            FloatingPointError: the teacher gives NaN or infinite values.
        """
        found = self.read(image, looked_up)
        if found is not None:
            return found
        # By itself, so that its rounding does not depend on which images beside it were found.
        return self.write(image, self.teacher.targets([image])[0], looked_up)

    def path(self, image: torch.Tensor) -> Path:
        """Where the target of an image (3, H, W), as the encoder takes it, is kept."""
        return _entry(self.folder, image_key(image, self.teacher.encoder))

    def look_up(self) -> TargetLookUp:
        """What finds targets ahead of training, in the processes that read images."""
        return TargetLookUp(self.folder, self.identity)

    def read(self, image: torch.Tensor, looked_up: LookedUp | None = None) -> torch.Tensor | None:
        """The target (1, D, h, w) float32 on the image's device; None where it is not there, or damaged."""
        target = load_target(self.path(image), self.identity) if looked_up is None else looked_up.target
        if target is None:
            self.misses += 1
            return None
        self.hits += 1
        return target.to(image.device, non_blocking=True).float()

    def write(self, image: torch.Tensor, target: torch.Tensor, looked_up: LookedUp | None = None) -> torch.Tensor:
        """Keep the target (1, D, h, w) of an image; returns what :meth:`read` will give.

        Raises:
            FloatingPointError: it has NaN or infinite values.
        """
        if not target.isfinite().all():
            raise FloatingPointError("the teacher's features are NaN or infinite")
        half = target.half()
        # What is too large for float16 is kept as it is.
        kept = half if half.isfinite().all() else target
        if self.writable:
            path = self.path(image) if looked_up is None else _entry(self.folder, looked_up.key)
            self._store(path, kept.cpu().contiguous())
        return kept.float()

    def _store(self, path: Path, stored: torch.Tensor) -> None:
        metadata = {"teacher": self.identity, "checksum": tensor_checksum(stored)}
        try:
            free = shutil.disk_usage(self.folder).free
            if free - stored.nbytes < RESERVE:
                self._stop_writing(f"{free / 2**30:.1f} GiB are free on its disk, {RESERVE / 2**30:.0f} are left so")
                return
            with atomic_write(path) as temporary:
                save_file({_NAME: stored}, temporary, metadata)
        except (OSError, SafetensorError) as error:
            self._stop_writing(str(error))

    def _stop_writing(self, reason: str) -> None:
        self.writable = False
        logger.warning("SPAR.TEACHER.CACHE_DIR: nothing more is written to %s: %s", self.folder, reason)


class LookedUp(NamedTuple):
    """What is known of an image's target before the image is used.

    Attributes:
        key: of the image in the cache.
        target: (1, D, h, w) on the CPU, float16 where it fits; None where it is not there.
    """

    key: str
    target: torch.Tensor | None


class TargetLookUp:
    """Finds targets by the pixels of images, where these are read, so that training does not wait for it.

    Args:
        folder: of a cache, those of one teacher.
        identity: of the teacher.
    """

    # In dataset dicts.
    NAME = "looked_up_target"

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def __call__(self, pixels: torch.Tensor) -> dict[str, LookedUp]:
        """From pixels (3, H, W) uint8 in RGB to an entry of the image's dict."""
        key = pixel_checksum(pixels)
        return {self.NAME: LookedUp(key, load_target(_entry(self._folder, key), self._identity))}


def _entry(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def load_target(path: Path, identity: str) -> torch.Tensor | None:
    """A target as it is stored, (1, D, h, w); None where it is not there, or damaged, which is logged."""
    try:
        with safe_open(path, "pt") as file:
            metadata, target = file.metadata() or {}, file.get_tensor(_NAME)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("Cached target %s cannot be read and is computed again: %s", path, error)
        return None
    if metadata != {"teacher": identity, "checksum": tensor_checksum(target)}:
        logger.warning("Cached target %s is damaged and is computed again", path)
        return None
    return target
