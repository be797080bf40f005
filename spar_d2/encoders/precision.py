"""Computation precisions: names, weight casting, and a context manager for full float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

# Autocast dtypes of matrix products; None does not change the autocast state of the caller.
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
# Major compute capability of the first NVIDIA generation with bfloat16 support.
_AMPERE = 8

Module = TypeVar("Module", bound=nn.Module)


def resolve_precision(precision: str, device: str | torch.device) -> str:
    """Resolve "auto" to "bfloat16" on GPUs that support it, and to "float32" on other devices.

    Other precisions are returned unchanged.
    """
    if precision != AUTO:
        return precision
    device = torch.device(device)
    supported = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _AMPERE
    return "bfloat16" if supported else "float32"


def cast_parameters(module: Module, dtype: torch.dtype) -> Module:
    """Cast the parameters of a module in place. Buffers, such as rotary periods, keep their dtype."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Context manager that computes in full float32 on a device, without autocast and TF32."""
    previous = torch.get_float32_matmul_precision()
    change = device.type == "cuda" and previous != "highest"
    with torch.autocast(device.type, enabled=False):
        if change:
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if change:
                torch.set_float32_matmul_precision(previous)
