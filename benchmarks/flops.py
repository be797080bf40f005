"""Floating-point operations (FLOPs) of a single pass, counted with fvcore.

A multiply-add counts as two operations, as in hardware specifications, whereas fvcore counts one. Convolutions, linear
layers and other matrix products, including attention, are counted. Norms, activations, softmax and the resampling of
position embeddings are not.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from spar_d2.encoders import DenseEncoder

_SIDES = (2, 3, 4)


def count_flops(encoder: DenseEncoder, cells: Sequence[int]) -> list[int] | None:
    """Count the operations of a pass over one image, for given numbers of patches.

    Only attention grows quadratically with the number of patches N; everything else is linear or constant. Therefore,
    three small images determine the count ``a + b * N + c * N^2`` of any image exactly.

    Args:
        encoder: encoder, which is not modified. Its precision and compilation do not matter.
        cells: numbers of patches, h * w of the feature map.

    Returns:
        Counts for each number of patches, or None if fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import fvcore.nn  # noqa: F401
        except ImportError:
            return None
        # A copy that shares the weights, because tracing does not support compiled blocks.
        plain = copy.copy(encoder).accelerate()
        samples = {side * side: _trace(plain, side * encoder.patch_size) for side in _SIDES}
    return [_interpolate(samples, number) for number in cells]


def _trace(encoder: DenseEncoder, size: int) -> int:
    from fvcore.nn import FlopCountAnalysis

    image = torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device)
    analysis = FlopCountAnalysis(encoder, image)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention, "aten::layer_norm", _zero)
    # Resampling of position embeddings uses it, the only operation that is not polynomial in the number of patches.
    analysis.set_op_handle("aten::einsum", _zero)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad(), _PlainSizes():
        return 2 * int(analysis.total())


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of softmax(Q K^T) V for traced Q (..., N, d), K (..., M, d) and V (..., M, e)."""
    from fvcore.nn.jit_handles import get_shape

    query, key, value = (get_shape(traced) for traced in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _zero(inputs: list[Any], outputs: list[Any]) -> int:
    # None would keep fvcore's default handle.
    return 0


class _PlainSizes(TorchFunctionMode):
    """Converts shapes to plain integers: tracing creates them from tensors, which interpolation does not support."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return torch.Size(int(number) for number in result) if isinstance(result, torch.Size) else result


def _interpolate(samples: dict[int, int], x: int) -> int:
    """Evaluate the polynomial through the known points at ``x`` (Lagrange interpolation in exact arithmetic)."""
    total = Fraction(0)
    for point, value in samples.items():
        total += value * math.prod(Fraction(x - other, point - other) for other in samples if other != point)
    return int(total)
