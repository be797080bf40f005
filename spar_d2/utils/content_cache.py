"""Cache files of computed results. Files are named by hashes of the inputs, and validated when they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spar_d2.utils.io import atomic_write

logger = logging.getLogger(__name__)

_Content = TypeVar("_Content")


def digest(*parts: str | torch.Tensor) -> str:
    """Return the SHA-256 hash (64 hex digits) of strings and of the values of tensors."""
    checksum = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            # NumPy does not support bfloat16, so view the tensor as bytes.
            checksum.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            checksum.update(part.encode())
    return checksum.hexdigest()


def read_tensors(path: str | os.PathLike, **metadata: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a file, and check its checksum and metadata.

    Args:
        path: safetensors file.
        **metadata: metadata that the file must have.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is corrupt, or its metadata differ.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, found = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(error) from error
    # Files that were written by earlier versions of this project may have no checksum.
    if found.get("checksum") not in (None, _checksum(tensors)) or not metadata.items() <= found.items():
        raise ValueError("its checksum or metadata does not match")
    return tensors


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    return digest(*(tensors[name] for name in sorted(tensors)))[:16]


class ContentCache:
    """A folder of tensors (safetensors) and JSON files. Corrupt files count as missing.

    Args:
        folder: path of the folder, which is created by the first write.
        key: config key of the folder, for messages.
        reserve: disk space in bytes that writes leave free.
        **metadata: metadata of all tensor files; files with other metadata count as corrupt.

    Attributes:
        writable: whether :meth:`try_save` writes; False after a failed write or :meth:`stop_writing`.
    """

    def __init__(self, folder: str | os.PathLike, key: str = "", reserve: int = 0, **metadata: str) -> None:
        self.folder, self.key, self.reserve, self.metadata = Path(folder), key, reserve, metadata
        self.writable = True

    def load(self, name: str, parse: Callable[[Any], _Content]) -> _Content | None:
        """Read a file and convert its content with ``parse``. Returns None if the file is missing or corrupt.

        If the file is corrupt, or ``parse`` fails, a warning is logged.
        """
        path = self.folder / name
        try:
            is_json = path.suffix == ".json"
            return parse(json.loads(path.read_text("utf-8")) if is_json else read_tensors(path, **self.metadata))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            logger.warning("%s is corrupt (%s) and will be recomputed", path, error)
            return None

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write CPU tensors atomically. Raises ``OSError`` if that fails or would leave less than ``reserve`` free."""
        free = shutil.disk_usage(self.folder).free if self.reserve else 0
        if free - sum(tensor.nbytes for tensor in tensors.values()) < self.reserve > 0:
            left, reserve = free / 2**30, self.reserve / 2**30
            raise OSError(f"its disk has {left:.1f} GiB free, of which {reserve:.0f} GiB are reserved")
        with atomic_write(self.folder / name) as temporary:
            try:
                save_file(tensors, temporary, {**self.metadata, "checksum": _checksum(tensors)})
            except SafetensorError as error:
                raise OSError(error) from error

    def try_save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors with :meth:`save`. If that fails, log a warning, and make the cache read-only."""
        if self.writable:
            try:
                self.save(name, tensors)
            except OSError as error:
                self.stop_writing(str(error))

    def stop_writing(self, reason: str) -> None:
        """Log why the folder cannot be written to, and make the cache read-only."""
        self.writable = False
        logger.warning("%s: no longer writing to %s: %s", self.key, self.folder, reason)
