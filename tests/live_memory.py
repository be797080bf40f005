"""Memory of tensors that are alive at the same time, exact to the byte, unlike the memory of the process."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context manager; ``peak`` is the most bytes at one time in tensors that were created within it.

    Memory that an operator allocates and frees itself is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self._storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self._before |= given - self._sizes.keys()
        output = func(*args, **(kwargs or {}))
        self._sizes = {key: kept for key, kept in self._sizes.items() if not kept[0].expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and self._storage(tensor)._cdata not in self._before:
                storage = self._storage(tensor)
                self._sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._sizes.values()))
        return output

    @staticmethod
    def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
        return tensor.untyped_storage()
