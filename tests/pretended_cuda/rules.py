"""PyTorch's behavior on CUDA: operators that make the CPU wait, mix devices, launch nothing, or add in any order.

By the sources of PyTorch 2.11 to 2.14, for compute capability 9.0 where it matters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

aten = torch.ops.aten
Predicate = Callable[[torch.Tensor], bool]

HALF = (torch.float16, torch.bfloat16)
MASKS = (torch.bool, torch.uint8)
INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor)
PUTTING = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# These take tensors of both devices: copies, and indices on the CPU.
MIXING = (aten.copy_.default, aten.set_.source_Storage, *INDEXING, *PUTTING)
# Not even numbers (0-dimensional tensors) of the CPU are taken beside tensors on CUDA.
_STRICT = {"cat", "stack"}
# The size or the value of the result is read back from the device.
_WAITING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "isin",
    "masked_select",
    "multinomial",
    "nms",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# They have no schema that says so.
_NO_KERNEL = {"_reshape_alias", "_unsafe_view", "is_same_size", "lift_fresh", "set_", "set_data"}
# Added up by atomic operations; whole numbers come out the same in any order.
_UNORDERED = {
    "cumsum",
    "embedding_dense_backward",
    "grid_sampler_2d_backward",
    "index_add",
    "index_add_",
    "nll_loss2d_backward",
    "nll_loss2d_forward",
    "put_",
    "replication_pad2d_backward",
    "scatter_add",
    "scatter_add_",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}
_REDUCED_IN_ANY_ORDER = {"scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_"}
# Made of functions that autocast computes in float32.
_MADE_OF_THEM = {"__pow__", "__rpow__", "cross_entropy", "interpolate", "normalize", "square"}


@functools.cache
def float32_functions() -> frozenset[str]:
    """Names of functions that autocast computes in float32 on CUDA, as the installed PyTorch's headers list them."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    listed = header[header.index("#define AT_FORALL_FP32(") : header.index("#define AT_FORALL_PROMOTE(")]
    return frozenset(re.findall(r"\b_\((?:ADD_NS\()?(\w+)", listed)) | _MADE_OF_THEM


@functools.cache
def name_of(func: torch._ops.OpOverload) -> str:
    """The name of an operator without namespace and overload."""
    return func._schema.name.split("::")[-1]


@functools.cache
def launches(func: torch._ops.OpOverload) -> bool:
    """Whether an operator runs anything on the device: no view, and no memory that is only allocated."""
    name = name_of(func)
    return not func.is_view and name not in _NO_KERNEL and not re.match(r"(new_)?empty(_|$)", name)


@functools.cache
def takes_device(func: torch._ops.OpOverload) -> bool:
    """Whether an operator can be asked for a result on a device."""
    return any(argument.name == "device" for argument in func._schema.arguments)


def foreign_to_cuda(func: torch._ops.OpOverload, tensors: list[torch.Tensor], on_cuda: list[bool]) -> list:
    """The CPU tensors that an operator refuses beside those on CUDA."""
    if all(on_cuda):
        return []
    if func in INDEXING or func in PUTTING:
        # An index may be on the CPU, but not the indexed tensor, and of assigned values only a number.
        foreign = [] if on_cuda[0] else tensors[:1]
        return foreign + [value for value in tensors[-1:] if func in PUTTING and value.dim() and not on_cuda[-1]]
    if func in MIXING or not any(on_cuda):
        return []
    strict = name_of(func) in _STRICT
    # A number on the CPU may be read beside tensors on CUDA, but not written to.
    written = name_of(func).endswith("_") and not on_cuda[0]
    refused = (not on and ((tensor.dim() and tensor.numel()) or strict) for tensor, on in zip(tensors, on_cuda))
    return tensors[:1] if written else [tensor for tensor, is_refused in zip(tensors, refused) if is_refused]


def waits(func: torch._ops.OpOverload, args: tuple, kwargs: dict, is_cuda: Predicate) -> Iterator[str]:
    """Why the CPU waits for the device in an operator on CUDA tensors, once for each reason."""
    name = name_of(func)
    if name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        yield name
    elif func is aten.copy_.default:
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if args[1].numel() and is_cuda(args[0]) != is_cuda(args[1]) and not non_blocking:
            yield "blocking copy"
    elif func in INDEXING or func in PUTTING:
        indices = [index for index in args[1] if index is not None]
        scalar = func in PUTTING and args[2].dim() == 0 and not is_cuda(args[2])
        if scalar and len(indices) == 1 and indices[0].dtype in MASKS and not (args[3:4] or kwargs.get("accumulate")):
            return  # a number for a mask is filled in
        for index in indices:
            if index.dtype in MASKS:
                yield "index by a mask"
            elif not is_cuda(index):
                yield "index on the CPU"
        if scalar:
            yield "number on the CPU"


def is_unordered(func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> bool:
    """Whether an operator on CUDA may add floating-point numbers in another order every time."""
    name = name_of(func)
    if name in _REDUCED_IN_ANY_ORDER:
        words = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, str)]
        is_in_any_order = words[0] in ("sum", "prod", "mean")
    elif func in PUTTING:
        is_in_any_order = bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
    else:
        is_in_any_order = name in _UNORDERED
    tensor = result[0] if isinstance(result, (tuple, list)) and result else result
    return is_in_any_order and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()


def attention_backend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> str:
    """Which of "flash", "efficient" and "MATH" (which writes the matrix of all pairs) computes attention in a type."""
    parts = (query, key, value)
    alike = all(part.dim() == 4 and part.stride(-1) == 1 and part.numel() for part in parts)
    dim = query.shape[-1]
    alike = alike and key.shape[-1] == dim
    if alike and mask is None and dtype in HALF and dim == value.shape[-1] <= 256:
        return "flash"
    aligned = all(part.shape[-1] % (16 // dtype.itemsize) == 0 for part in parts)
    return "efficient" if alike and aligned and dtype in (*HALF, torch.float32) else "MATH"
