"""Reading of weights from TorchScript archives, such as OpenAI's CLIP models, without executing code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

_TYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


def root_of(archive: zipfile.ZipFile) -> str:
    """Return the root folder of a PyTorch archive, with "/". Raises ``ValueError`` for other archives."""
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise ValueError("it is a zip archive, but not a PyTorch archive")
    return roots[0]


def is_script(archive: zipfile.ZipFile) -> bool:
    """Return whether a PyTorch archive contains a TorchScript model, and not a ``torch.save`` file."""
    return f"{root_of(archive)}constants.pkl" in archive.namelist()


def read_script(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """Read the state dict of a TorchScript model.

    ``torch.jit.load`` would compile and execute code from the archive. This function reads only the attributes of the
    modules, regardless of their classes.

    Raises:
        pickle.UnpicklingError, KeyError, ValueError, RuntimeError: the archive is corrupt, or contains more than
            modules and tensors.
    """
    model = _Reader(archive, root_of(archive)).load()
    if not isinstance(model, _Module):
        raise ValueError("it contains no TorchScript model")
    tensors: dict[str, torch.Tensor] = {}
    visited, pending = set(), [("", model)]
    while pending:
        prefix, module = pending.pop()
        # In a corrupt file, a module may contain itself.
        if id(module) in visited:
            continue
        visited.add(id(module))
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                pending.append((f"{prefix}{name}.", value))
    return tensors


class _Module:
    """Stands in for a module of any class; holds its attributes."""

    attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


# The C unpickler is faster, but allocates memory for as many objects as the file claims to have.
class _Reader(pickle._Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if module == "torch.jit._pickle":  # typed lists and dictionaries
            return _items
        allowed = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): OrderedDict}
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: tuple) -> torch.Tensor:
        _, dtype, name, *_ = pid
        if name not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{name}"))
            self._storages[name] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[name]


def _tensor(storage: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)


def _items(items: object, *_: object) -> object:
    return items
