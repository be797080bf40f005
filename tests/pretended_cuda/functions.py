"""Pretended functions and methods of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

from pretended_cuda import rules
from pretended_cuda.tensors import CPU, CUDA, is_cuda_device, tensors_in

if TYPE_CHECKING:
    from pretended_cuda.device import PretendedCuda

_PLAIN = {"__set__", "dim", "numel", "size", "stride", "data_ptr", "untyped_storage"}
_COPYING = ("tensor", "new_tensor")
_FROM_DATA = (*_COPYING, "as_tensor", "asarray")


class Functions(TorchFunctionMode):
    """Pretended functions and methods of tensors."""

    def __init__(self, gpu: PretendedCuda) -> None:
        super().__init__()
        self.gpu = gpu
        self._special = {
            **dict.fromkeys(("to", "cuda", "cpu", "type_as"), self._to),
            **dict.fromkeys(_FROM_DATA, self._from_data),
            **dict.fromkeys(("numpy", "__array__"), self._numpy),
            "tolist": self._tolist,
            "__deepcopy__": self._copy,
            "pin_memory": self._pin,
            "get_device": lambda func, name, args, kwargs: 0 if args[0] in self.gpu.storages else -1,
            "record_stream": lambda func, name, args, kwargs: None,
        }

    def __torch_function__(self, func: Callable, kinds: Iterable, args: tuple = (), kwargs: dict | None = None):
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        if name in _PLAIN:
            return func(*args, **(kwargs or {}))
        return self._special.get(name, self._call)(func, name, args, dict(kwargs or {}))

    def _property(self, func: Callable, args: tuple) -> object:
        which = getattr(getattr(func, "__self__", None), "__name__", "")
        if which in ("device", "is_cuda", "is_cpu") and args[0] in self.gpu.storages:
            return {"device": CUDA, "is_cuda": True, "is_cpu": False}[which]
        return func(*args)

    def _call(self, func: Callable, name: str, args: tuple, kwargs: dict) -> object:
        gpu = self.gpu
        cuda, asked = any(tensor in gpu.storages for tensor in tensors_in(args, kwargs)), None
        if kwargs.get("device") is not None:
            asked = is_cuda_device(kwargs["device"])
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        drawn_on_cuda = cuda if asked is None else asked
        if kwargs.get("generator") is not None and drawn_on_cuda != (kwargs["generator"].device.type == "cuda"):
            found, wanted = kwargs["generator"].device, CUDA if drawn_on_cuda else CPU
            raise RuntimeError(f"Expected a '{wanted.type}' device type for generator but found '{found.type}'")
        with gpu.calling(cuda, asked):
            if cuda and (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
                return _autocast_as_on_cuda(func, name, args, kwargs)
            return func(*args, **kwargs)

    def _copy(self, func: Callable, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        """Copied without an operator; the list has the copies made before."""
        result = func(*args, **kwargs)
        return self.gpu.storages.add(result) if args[0] in self.gpu.storages else result

    def _to(self, func: Callable, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        gpu, (x, *rest) = self.gpu, args
        on_cuda = x in gpu.storages
        to_cuda, dtype, non_blocking = on_cuda, None, kwargs.get("non_blocking", False)
        options = {key: kwargs.pop(key) for key in ("copy", "memory_format") if key in kwargs}
        other = next((arg for arg in (*rest, *kwargs.values()) if isinstance(arg, torch.Tensor)), None)
        if name in ("cuda", "cpu"):
            to_cuda, non_blocking = name == "cuda", non_blocking or rest[1:2] == [True]
        elif other is not None:
            to_cuda, dtype = other in gpu.storages, other.dtype
            non_blocking = non_blocking or rest[1:2] == [True]
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*rest, **kwargs)
            to_cuda = on_cuda if device is None else is_cuda_device(device)
        dtype = dtype or x.dtype
        if to_cuda == on_cuda:
            with gpu.calling(on_cuda):
                return x.to(dtype, **options)
        if not non_blocking:
            gpu.wait("blocking copy")
        cast = "" if dtype == x.dtype else f", cast {x.dtype} to {dtype} before"
        gpu.copy(("to the device" if to_cuda else "to the CPU") + cast, x.numel() * dtype.itemsize)
        return _Move.apply(x, dtype, gpu, to_cuda)

    def _from_data(self, func: Callable, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        """Tensors of numbers, lists and arrays: made on the CPU, and copied, which is waited for."""
        gpu, device = self.gpu, kwargs.pop("device", None)
        like = args[0] if name == "new_tensor" else None
        data = args[0] if like is None else args[1]
        source = like if like is not None else data
        to_cuda = is_cuda_device(device)
        if device is None and isinstance(source, torch.Tensor):
            to_cuda = source in gpu.storages
        if isinstance(data, torch.Tensor):
            dtype = kwargs.get("dtype") or (data if like is None else like).dtype
            return self._to(func, "to", (data, CUDA if to_cuda else CPU, dtype), {"copy": name in _COPYING})
        result = func(*args, **kwargs)
        if not to_cuda:
            return result
        gpu.wait("blocking copy")
        gpu.copy("to the device", result.numel() * result.element_size())
        return gpu.moved(result, result.dtype, True).requires_grad_(result.requires_grad)

    def _numpy(self, func: Callable, name: str, args: tuple, kwargs: dict) -> object:
        if args[0] in self.gpu.storages:
            if not (name == "numpy" and kwargs.get("force")):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                    f"memory first. ({self.gpu.place()})"
                )
            self.gpu.wait("blocking copy")
        return func(*args, **kwargs)

    def _tolist(self, func: Callable, name: str, args: tuple, kwargs: dict) -> object:
        if args[0] in self.gpu.storages:
            self.gpu.wait("tolist")
        return func(*args, **kwargs)

    def _pin(self, func: Callable, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        if args[0] in self.gpu.storages:
            raise RuntimeError("cannot pin 'torch.cuda' tensors, only dense CPU tensors can be pinned")
        return args[0]


class _Move(torch.autograd.Function):
    """A copy from one device to the other; its gradient goes back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, dtype: torch.dtype, gpu: PretendedCuda, to_cuda: bool) -> torch.Tensor:
        ctx.back = x.dtype, gpu, not to_cuda
        return gpu.moved(x, dtype, to_cuda)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return _Move.apply(gradient, *ctx.back), None, None, None


def _autocast_as_on_cuda(func: Callable, name: str, args: tuple, kwargs: dict) -> object:
    """A call by the rules of CUDA's autocast, through the CPU's; the two differ in their float32 operators."""
    before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cpu", enabled)
    torch.set_autocast_dtype("cpu", torch.get_autocast_dtype("cuda"))
    try:
        if enabled and name in rules.float32_functions():
            args, kwargs = tuple(map(_as_float32, args)), {key: _as_float32(arg) for key, arg in kwargs.items()}
        return func(*args, **kwargs)
    finally:
        torch.set_autocast_enabled("cpu", before[0])
        torch.set_autocast_dtype("cpu", before[1])


def _as_float32(argument: object) -> object:
    is_half = isinstance(argument, torch.Tensor) and argument.dtype in rules.HALF
    return argument.float() if is_half else argument
