"""Precisions of computation: what they are called, weights in another one, and what is always in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

# Of matrix products; None leaves them to the surroundings.
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
# The first generation of NVIDIA's that multiplies bfloat16.
_AMPERE = 8

Module = TypeVar("Module", bound=nn.Module)


def resolve_precision(precision: str, device: str | torch.device) -> str:
    """The precision that "auto" stands for on a device: "bfloat16" on GPUs that compute in it, else "float32".

    Others than "auto" are returned as they are.
    """
    if precision != AUTO:
        return precision
    device = torch.device(device)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _AMPERE
    return "bfloat16" if able else "float32"


def cast_parameters(module: Module, dtype: torch.dtype) -> Module:
    """Cast a module's parameters, in place and for good; its buffers stay, such as periods of rotary positions."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within it, float32 operations on a device are computed in float32: no autocast, no TF32."""
    before = torch.get_float32_matmul_precision()
    change = device.type == "cuda" and before != "highest"
    with torch.autocast(device.type, enabled=False):
        if change:
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if change:
                torch.set_float32_matmul_precision(before)
