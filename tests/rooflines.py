"""Full-size models on a GPU that is not there: launches, casts of weights, copies and the least time of each operator.

    with WithoutValues():
        encoder = build_encoder("ViT-B-16")
    encoder = on_device(encoder).accelerate("bfloat16").freeze()
    with Rooflines(encoder) as counted:
        encoder(images(32, 3, 224, 224))
    counted.launches, counted.milliseconds, counted.weight_casts

Tensors on the device are FakeTensors: they have shapes, types and a device, but neither memory nor values. Those on the
CPU are real. Autocast is CUDA's own. The time of an operator is the longer of computing and of moving its bytes through
memory once; the sum leaves out what launches cost, caches, and all that makes a kernel slower than the chip.

Limits: what is read back from the device is made up (truth, zero, a half); an operator written by hand counts as one
launch that reads and writes its tensors once, and needs ``FLOPS_OF_OWN`` operations for every pixel and query.
"""

from __future__ import annotations

import collections
import contextlib
import re
import unittest.mock as mock
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretended_cuda import rules
from pretended_cuda.tensors import Storages, is_cuda_device, tensors_in

# Of an H100: operations and bytes a second.
HALF, FLOAT32, MEMORY = 790e12, 60e12, 3.35e12
FLOPS_OF_OWN = {"best_query": 6}
MODE = FakeTensorMode(allow_non_fake_inputs=True)
_READ_BACK = {"item": 0.5, "__float__": 0.5, "__bool__": True, "__int__": 0, "__index__": 0, "tolist": []}
# The first tensor is only written to.
_WRITTEN_ONLY = {"copy_", "fill_", "zero_"}
# They read as much as they write. The size of a view on all windows of an image is no size in memory.
_PICKED = {"index", "index_select", "gather", "embedding"}
aten = torch.ops.aten


class WithoutValues(TorchFunctionMode):
    """Within it, large tensors are not filled with anything, so that models are built in no time."""

    def __torch_function__(self, func: Callable, kinds: Iterable, args: tuple = (), kwargs: dict | None = None):
        is_in_place = re.search("[^_]_$", getattr(func, "__name__", ""))
        if is_in_place and args and isinstance(args[0], torch.Tensor) and args[0].numel() > 1 << 14:
            return args[0]
        return func(*args, **(kwargs or {}))


def on_device(module: nn.Module) -> nn.Module:
    """The module, changed in place, with its parameters and buffers on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = images(*parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = images(*buffer.shape, dtype=buffer.dtype)
    return module


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on the device."""
    with MODE:
        return torch.empty(*shape, dtype=dtype, device="cuda")


@dataclass
class Row:
    """All calls of one operator with results of one type."""

    calls: int = 0
    flops: float = 0
    bytes: float = 0
    seconds: float = 0


class Rooflines:
    """Counts work on the device inside the context.

    Args:
        model: whose weights' casts are counted.

    Attributes:
        rows: by operator and type of the result.
        weight_casts, copies, copied_bytes, waits: copies are those from the CPU to the device, waits those of the CPU.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.rows: dict[tuple[str, str], Row] = collections.defaultdict(Row)
        self.weight_casts = self.copies = self.copied_bytes = self.waits = 0
        self._weights = {Storages.address(weight) for weight in model.parameters()} if model is not None else set()

    def __enter__(self) -> Rooflines:
        self._stack = contextlib.ExitStack()
        answers = {"is_available": True, "is_bf16_supported": True, "device_count": 1, "get_device_capability": (9, 0)}
        for name, answer in answers.items():
            patch = mock.patch.object(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
            self._stack.enter_context(patch)
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    @property
    def launches(self) -> int:
        return sum(row.calls for row in self.rows.values())

    @property
    def milliseconds(self) -> float:
        """The sum of the least times of all operators."""
        return 1e3 * sum(row.seconds for row in self.rows.values())

    def report(self, top: int = 16) -> str:
        """All rows as text, the slowest first."""
        flops, size = (sum(getattr(row, name) for row in self.rows.values()) for name in ("flops", "bytes"))
        lines = [
            f"{self.launches} launches, {self.milliseconds:.2f} ms, {self.weight_casts} casts of weights, "
            f"{self.copies} copies ({self.copied_bytes / 1e6:.2f} MB), {self.waits} waits, "
            f"{flops / 1e9:.0f} GFLOP, {size / 1e9:.2f} GB"
        ]
        for (name, dtype), row in sorted(self.rows.items(), key=lambda item: -item[1].seconds)[:top]:
            lines.append(
                f"  {name:<40} {dtype:<9} {row.calls:>5} x {row.flops / 1e9:>9.1f} GFLOP {row.bytes / 1e9:>8.3f} GB "
                f"{1e3 * row.seconds:>8.3f} ms"
            )
        return "\n".join(lines)

    def sent(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A CPU tensor on the device."""
        self.copies += 1
        self.copied_bytes += tensor.numel() * dtype.itemsize
        with MODE:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cuda")

    def add(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        """Count an operator on the device."""
        outputs = tensors_in(result)
        if not outputs or not rules.launches(func):
            return
        name, first = rules.name_of(func), outputs[0]
        if name == "_to_copy" and Storages.address(args[0]) in self._weights and args[0].dtype != first.dtype:
            self.weight_casts += 1
        inputs = {id(tensor): tensor for tensor in tensors_in(args, kwargs) if isinstance(tensor, FakeTensor)}
        if rules.takes_device(func) and name != "_to_copy":
            inputs = {}  # made of nothing but a shape
        elif name in _WRITTEN_ONLY:
            inputs.pop(id(args[0]), None)
        elif name in _PICKED:
            inputs = {0: first}
        if "attention" in name:
            outputs = outputs[:1]
        row = self.rows[name, str(first.dtype).removeprefix("torch.")]
        flops = _flops(name, args, first)
        size = sum(map(_bytes, (*inputs.values(), *outputs)))
        peak = HALF if first.dtype in rules.HALF else FLOAT32
        row.calls += 1
        row.flops += flops
        row.bytes += size
        row.seconds += max(flops / peak, size / MEMORY)


def _flops(name: str, args: tuple, output: torch.Tensor) -> float:
    """Of products and attention; everything else waits for memory."""
    if name in FLOPS_OF_OWN:
        scores = args[0][0]
        return FLOPS_OF_OWN[name] * output.numel() * scores.shape[-1] * len(args[0])
    if "attention" in name:
        return 4 * args[0].numel() * args[1].shape[-2]
    if name == "convolution":
        return 2 * output.numel() * args[1][0].numel()
    products = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
    if name in products:
        left, right = args[products[name] :][:2]
        return 2 * left.numel() * right.shape[-1]
    return 0


def _bytes(tensor: torch.Tensor) -> int:
    """Of memory, which is less than a tensor seems to have where it is expanded."""
    elements = 1
    for side, stride in zip(tensor.shape, tensor.stride()):
        elements *= side if stride else 1
    return elements * tensor.element_size()


class _Functions(TorchFunctionMode):
    """Moves tensors to the device, and invents values that are read from it."""

    def __init__(self, counted: Rooflines) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Callable, kinds: Iterable, args: tuple = (), kwargs: dict | None = None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        is_fake = bool(args) and isinstance(args[0], FakeTensor)
        if name == "pin_memory":
            return args[0]
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, name, args, kwargs)
        if name == "scaled_dot_product_attention" and is_fake:
            return _attention(*args, **kwargs)
        if name in _READ_BACK and is_fake:
            self.counted.waits += 1
            return _READ_BACK[name]
        if kwargs.get("device") is not None and is_cuda_device(kwargs["device"]):
            if name in ("tensor", "as_tensor"):
                self.counted.waits += 1
                made = func(*args, **{**kwargs, "device": "cpu"})
                return self.counted.sent(made, made.dtype)
            with MODE:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _moved(self, func: Callable, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        x, rest = args[0], [arg for arg in (*args[1:], *kwargs.values()) if not isinstance(arg, bool)]
        was_there = isinstance(x, FakeTensor)
        like = next((arg for arg in rest if isinstance(arg, torch.Tensor)), None)
        device = next((arg for arg in rest if isinstance(arg, (str, torch.device))), None)
        is_there = was_there if device is None else is_cuda_device(device)
        if like is not None or name != "to":
            is_there = isinstance(like, FakeTensor) or name == "cuda"
        dtype = like.dtype if like is not None else next((arg for arg in rest if isinstance(arg, torch.dtype)), x.dtype)
        if is_there == was_there:
            return x.to(dtype, **{key: kwargs[key] for key in ("copy", "memory_format") if key in kwargs})
        self.counted.waits += not (kwargs.get("non_blocking") or True in args[1:])
        return self.counted.sent(x, dtype) if is_there else torch.zeros(x.shape, dtype=dtype)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> torch.Tensor:
    """By the kernel that a GPU has for it, which FakeTensors are not told of."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    backend = rules.attention_backend(query, key, value, attn_mask, query.dtype)
    with torch.autocast("cuda", enabled=False):
        if backend == "flash":
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
        if backend == "efficient":
            return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False, dropout_p)[0]
    raise RuntimeError(f"attention of {tuple(query.shape)} {query.dtype} would write a matrix of all pairs")


class _Operators(TorchDispatchMode):
    """Counts operators on the device, below autograd and autocast."""

    def __init__(self, counted: Rooflines) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, kinds: Iterable, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors_in(args, kwargs, result)):
            self.counted.add(func, args, kwargs, result)
        return result
