"""Which tensors are on the pretended device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Storages:
    """Which storages are on the pretended device: those of tensors made there, as long as they live."""

    def __init__(self) -> None:
        # As long as there is a weak reference, nothing else gets the address of a storage.
        self._known: dict[int, StorageWeakRef] = {}
        self._purge_at = 1 << 10

    def __contains__(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return self.has(self.address(tensor))

    def has(self, address: int | None) -> bool:
        """Whether the storage of an :meth:`address` is on the device."""
        return address in self._known

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor is on the device; returns it."""
        with torch._C.DisableTorchFunction():
            if tensor.layout == torch.strided and tensor.device.type == "cpu":
                reference = StorageWeakRef(tensor.untyped_storage())
                self._known[reference.cdata] = reference
        if len(self._known) > self._purge_at:
            self._known = {key: reference for key, reference in self._known.items() if not reference.expired()}
            self._purge_at = 2 * len(self._known) + (1 << 10)
        return tensor

    @staticmethod
    def address(tensor: torch.Tensor) -> int | None:
        """Of a tensor's storage; None where it has none. Not within function modes."""
        return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def is_cuda_device(device: object) -> bool:
    """Whether a device, by any name for it, is CUDA; a number is one of its devices."""
    if device is None or isinstance(device, int):
        return device is not None
    return torch.device(device).type == "cuda"


def tensors_in(*trees: object) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts, in their order."""
    found: list[torch.Tensor] = []
    _collect(trees, found)
    return found


def _collect(trees: Iterable, found: list[torch.Tensor]) -> None:
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, (list, tuple)):
            _collect(tree, found)
        elif isinstance(tree, dict):
            _collect(tree.values(), found)
