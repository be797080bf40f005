"""Floating-point operations of a single pass, counted with fvcore.

A multiply-add counts as two operations, as in the figures of makers of hardware; fvcore's own numbers count it as one.
Counted are convolutions, linear layers and other matrix products, attention included; norms, activations, softmax and
the resampling of positions are not.
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
    """Operations of a pass over one image, for each number of patches in it.

    Attention is the only part whose work grows with the square of the number of patches N, all else grows linearly or
    is constant. So three small images tell the count ``a + b * N + c * N^2`` of any image exactly.

    Args:
        encoder: left as it is; how it was accelerated makes no difference.
        cells: numbers of patches, h * w of the feature map.

    Returns:
        As many counts, or None where fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import fvcore.nn  # noqa: F401
        except ImportError:
            return None
        # A copy with the same weights: tracing takes no compiled blocks.
        plain = copy.copy(encoder).accelerate()
        known = {side * side: _trace(plain, side * encoder.patch_size) for side in _SIDES}
    return [_through(known, number) for number in cells]


def _trace(encoder: DenseEncoder, size: int) -> int:
    from fvcore.nn import FlopCountAnalysis

    image = torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device)
    analysis = FlopCountAnalysis(encoder, image)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention, "aten::layer_norm", _nothing)
    # Positions are resampled by it, the only work that is no polynomial in the number of patches.
    analysis.set_op_handle("aten::einsum", _nothing)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad(), _PlainSizes():
        return 2 * int(analysis.total())


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of softmax(Q K^T) V for traced Q (..., N, d), K (..., M, d) and V (..., M, e)."""
    from fvcore.nn.jit_handles import get_shape

    query, key, value = (get_shape(traced) for traced in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    # fvcore keeps its own handle where it is given None.
    return 0


class _PlainSizes(TorchFunctionMode):
    """Shapes made of plain numbers: tracing makes them of tensors, which interpolation does not take."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return torch.Size(int(number) for number in result) if isinstance(result, torch.Size) else result


def _through(known: dict[int, int], x: int) -> int:
    """At ``x``, the polynomial through the known points (Lagrange's formula, without rounding)."""
    total = Fraction(0)
    for own, value in known.items():
        total += value * math.prod(Fraction(x - other, own - other) for other in known if other != own)
    return int(total)
