"""Checks and records of operators, below autograd and autocast."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretended_cuda import rules
from pretended_cuda.tensors import Storages, tensors_in

if TYPE_CHECKING:
    from pretended_cuda.device import PretendedCuda

_MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


class Operators(TorchDispatchMode):
    """Records operators, below autograd and autocast."""

    def __init__(self, gpu: PretendedCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, kinds: Iterable, args: tuple = (), kwargs: dict | None = None) -> object:
        gpu, kwargs = self.gpu, kwargs or {}
        if gpu.quiet:
            return func(*args, **kwargs)
        if _is_composite(func):  # as in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func, args: tuple, kwargs: dict) -> object:
        gpu = self.gpu
        tensors = tensors_in(args, kwargs)
        addresses = list(map(Storages.address, tensors))
        on_cuda = [gpu.storages.has(address) for address in addresses]
        is_there = any(on_cuda)
        makes = on_cuda[0] if func is rules.aten.copy_.default else is_there if tensors else gpu.around
        if gpu.asked is not None and rules.takes_device(func):
            makes = gpu.asked
        if is_there:
            self._check(func, args, kwargs, tensors, on_cuda)
        result = func(*args, **kwargs)
        if makes or is_there:
            self._note(func, args, kwargs, result)
        if makes:
            for tensor in tensors_in(result):
                if Storages.address(tensor) not in addresses:
                    gpu.storages.add(tensor)
        return result

    def _check(self, func, args: tuple, kwargs: dict, tensors: list[torch.Tensor], on_cuda: list[bool]) -> None:
        gpu = self.gpu
        if refused := rules.foreign_to_cuda(func, tensors, on_cuda):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in refused)
            raise RuntimeError(f"{_MIXED} {rules.name_of(func)} of CPU tensors {shapes}, at {gpu.place()}")
        for reason in rules.waits(func, args, kwargs, gpu.storages.__contains__):
            gpu.wait(reason)
            if reason.endswith("on the CPU"):
                gpu.copy(f"to the device, {reason}", 8)
        if func is rules.aten.copy_.default and on_cuda[0] != on_cuda[1]:
            gpu.copy("to the device" if on_cuda[0] else "to the CPU", tensors[1].numel() * tensors[0].element_size())

    def _note(self, func, args: tuple, kwargs: dict, result: object) -> None:
        counters = [self.gpu.launches] if rules.launches(func) else []
        if rules.is_unordered(func, args, kwargs, result):
            counters.append(self.gpu.unordered)
        if counters:
            key = rules.name_of(func), self.gpu.place()
            for counter in counters:
                counter[key] += 1


@functools.cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
