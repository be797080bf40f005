"""The pretended device itself."""

from __future__ import annotations

import contextlib
import functools
import types
import unittest.mock as mock
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import _allowed_determinism_checks_to_fns

from pretended_cuda import rules
from pretended_cuda.functions import Functions
from pretended_cuda.operators import Operators
from pretended_cuda.record import Record
from pretended_cuda.tensors import CPU, CUDA, Storages, is_cuda_device, tensors_in


class PretendedCuda(Record):
    """The device, which exists inside the context; :class:`Record` has its events."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = Storages()
        self.quiet = False  # within a copy between the devices
        self.around = False  # within a function of tensors on the device
        self.asked: bool | None = None  # within a function that was asked for a result on the device, or on the CPU
        self._functions = Functions(self)

    def __enter__(self) -> PretendedCuda:
        self._stack = contextlib.ExitStack()
        # Tensors of tests are small: threads would only wait for each other.
        self._stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        for target, name, value in self._patches():
            self._stack.enter_context(mock.patch.object(target, name, value, create=True))
        # Tensors saved for a gradient are examined within functions, and recomputed ones are not.
        for name, look in list(_allowed_determinism_checks_to_fns.items()):
            look = functools.partial(_as_cpu_tensor, look)
            self._stack.enter_context(mock.patch.dict(_allowed_determinism_checks_to_fns, {name: look}))
        self._stack.enter_context(self._functions)
        self._stack.enter_context(Operators(self))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def _patches(self) -> Iterator[tuple[object, str, object]]:
        about = {"name": "pretended", "major": 9, "minor": 0, "total_memory": 80 << 30, "multi_processor_count": 132}
        answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True}
        answers |= {"is_initialized": False, "get_device_name": "pretended", "get_device_capability": (9, 0)}
        answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), 0)
        answers |= dict.fromkeys(("manual_seed", "manual_seed_all", "empty_cache", "reset_peak_memory_stats"))
        answers |= {"set_device": None, "init": None, "get_device_properties": types.SimpleNamespace(**about)}
        for name, answer in answers.items():
            yield torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer
        yield torch.cuda, "synchronize", lambda *args: self.wait("synchronize")
        yield torch, "Generator", _Generator
        yield F, "scaled_dot_product_attention", self._attention(F.scaled_dot_product_attention)
        for module in (torch.autograd, torch.autograd.graph):
            yield module, "_engine_run_backward", self._backward(module._engine_run_backward)
        # Loaders leave memory as it is, and start no thread for it.
        yield torch.utils.data.DataLoader, "pin_memory", property(lambda own: False, lambda own, value: None)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            yield torch.optim.Optimizer, name, lambda own: None

    def _attention(self, real: Callable) -> Callable:
        def attention(query, key, value, attn_mask=None, *args, **kwargs):
            if query in self.storages:
                lowered = torch.is_autocast_enabled("cuda")
                dtype = torch.get_autocast_dtype("cuda") if lowered else query.dtype
                with torch._C.DisableTorchFunction():
                    backend = rules.attention_backend(query, key, value, attn_mask, dtype)
                    what = f"{backend} {dtype} of {query.shape[-1]} channels"
                self.attention[what, self.place()] += 1
            return real(query, key, value, attn_mask, *args, **kwargs)

        return attention

    def _backward(self, real: Callable) -> Callable:
        """Backward passes run Python too: in functions with own gradients, and where checkpoints recompute."""

        def backward(roots, *args, **kwargs):
            is_active = self._functions in _get_current_function_mode_stack()
            cuda = any(root in self.storages for root in tensors_in(roots))
            with contextlib.nullcontext() if is_active else self._functions, self.calling(cuda):
                return real(roots, *args, **kwargs)

        return backward

    @contextlib.contextmanager
    def calling(self, cuda: bool, asked: bool | None = None) -> Iterator[None]:
        """Within it, tensors that are made of no others are on the device, or where they were asked for."""
        before = self.around, self.asked
        self.around, self.asked = cuda, asked
        try:
            yield
        finally:
            self.around, self.asked = before

    def wait(self, what: str) -> None:
        self.waits[what, self.place()] += 1

    def copy(self, what: str, size: int) -> None:
        key = what, self.place()
        self.copies[key] += 1
        self.bytes_copied[key] += size

    def moved(self, x: torch.Tensor, dtype: torch.dtype, to_cuda: bool) -> torch.Tensor:
        """A copy on the other device, which nobody counts."""
        self.quiet = True
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                y = x.detach().to(dtype, copy=True)
        finally:
            self.quiet = False
        return self.storages.add(y) if to_cuda else y


class _Generator(torch.Generator):
    """Random numbers of a CPU generator for either device."""

    def __new__(cls, device: str | torch.device = "cpu") -> _Generator:
        generator = super().__new__(cls)
        generator.on_cuda = is_cuda_device(device)
        return generator

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        return CUDA if self.on_cuda else CPU


def _as_cpu_tensor(look: Callable[[torch.Tensor], dict], tensor: torch.Tensor) -> dict:
    with torch._C.DisableTorchFunction():
        return look(tensor)
