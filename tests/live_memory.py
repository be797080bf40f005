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
        self._before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Another storage can take the address of one that is gone.
        self._before = {key: known for key, known in self._before.items() if not known.expired()}
        self._sizes = {key: kept for key, kept in self._sizes.items() if not kept[0].expired()}
        given = [self._storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._before |= {part._cdata: StorageWeakRef(part) for part in given if part._cdata not in self._sizes}
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
