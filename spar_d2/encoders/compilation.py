"""Compiled functions, one per use case."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch

FIXED_SHAPE = "fixed shape"


@functools.cache
def compiled(step: Callable, use: str) -> Callable:
    """Compile a function with ``torch.compile``, once per use case for all blocks of all encoders of a family.

    PyTorch stops compiling a code object after ``torch._dynamo.config.recompile_limit`` recompilations. Training,
    teacher and evaluation together would reach this limit, so each use case gets a copy of the code object.

    Args:
        step: plain Python function without a closure.
        use: name of the use case. ``FIXED_SHAPE`` compiles for each input shape, others with dynamic shapes.
    """
    code = step.__code__.replace(co_name=f"{step.__name__}_{use.replace(' ', '_')}")
    duplicate = types.FunctionType(code, step.__globals__, step.__name__, step.__defaults__)
    return torch.compile(duplicate, dynamic=use != FIXED_SHAPE)
