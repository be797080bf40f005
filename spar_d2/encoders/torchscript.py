"""Tensors of TorchScript archives, such as those that OpenAI distributes its CLIP models in."""

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
    """The folder of an archive of PyTorch's, with "/"; raises ``ValueError`` where it is another archive."""
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise ValueError("it is a zip archive, but none of PyTorch's")
    return roots[0]


def is_script(archive: zipfile.ZipFile) -> bool:
    """Whether an archive of PyTorch's holds a TorchScript model rather than what ``torch.save`` wrote."""
    return f"{root_of(archive)}constants.pkl" in archive.namelist()


def read_script(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """The state dict of a TorchScript model.

    ``torch.jit.load`` compiles the archive's code, runs what it says about restoring objects, and its operators may
    write files. So only the attributes of the modules are read here, by their names, whatever classes they are of.

    Raises:
        pickle.UnpicklingError, KeyError, ValueError, RuntimeError: it is damaged, or holds more than modules and
            tensors.
    """
    model = _Reader(archive, root_of(archive)).load()
    if not isinstance(model, _Module):
        raise ValueError("it holds no TorchScript model")
    tensors: dict[str, torch.Tensor] = {}
    seen, left = set(), [("", model)]
    while left:
        prefix, module = left.pop()
        # A damaged file may hold a module within itself.
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                left.append((f"{prefix}{name}.", value))
    return tensors


class _Module:
    """Attributes of a module of any class."""

    attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


# Not the faster reader in C: that one reserves memory for as many objects as a file claims to have.
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
        if module == "torch.jit._pickle":  # lists and dictionaries with the type of their items
            return _items
        allowed = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): OrderedDict}
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
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
