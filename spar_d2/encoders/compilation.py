"""Compiled functions, one for each use."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch

FIXED_SHAPE = "fixed shape"


@functools.cache
def compiled(step: Callable, use: str) -> Callable:
    """A function compiled with ``torch.compile``, for all blocks of all encoders of a family that use it so.

    PyTorch counts what it compiles by the code of a function, and stops compiling at a limit
    (``torch._dynamo.config.recompile_limit``). A training, its teacher and its evaluation together reach it, so each
    use has a copy of the code of its own.

    Args:
        step: a plain Python function without a closure.
        use: any text; with ``FIXED_SHAPE`` code is compiled for every shape anew, else for all shapes at once.
    """
    code = step.__code__.replace(co_name=f"{step.__name__}_{use.replace(' ', '_')}")
    own = types.FunctionType(code, step.__globals__, step.__name__, step.__defaults__)
    return torch.compile(own, dynamic=use != FIXED_SHAPE)
