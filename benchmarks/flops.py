"""Floating-point operations (FLOPs) of a single pass, counted with PyTorch's counter.

A multiply-add counts as two operations, as in hardware specifications. Convolutions, linear layers and attention are
counted. Norms, activations, softmax and the resampling of position embeddings are not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from spar_d2.encoders import DenseEncoder

_SIDES = (2, 3, 4)
# Without batched products: they resample position embeddings, or are parts of attention, which is counted separately.
_COUNTED = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)


def count_flops(encoder: DenseEncoder, cells: Sequence[int]) -> list[int]:
    """Count the operations of a pass over one image, for given numbers of patches.

    Only attention grows quadratically with the number of patches N; everything else is linear or constant. Therefore,
    three small images determine the count ``a + b * N + c * N^2`` of any image exactly.

    Args:
        encoder: encoder, which is not modified. Its precision and compilation do not matter.
        cells: numbers of patches, h * w of the feature map.

    Returns:
        Counts for each number of patches.
    """
    # A copy that shares the weights, because operations in compiled blocks are not counted.
    plain = copy.copy(encoder).accelerate()
    samples = {side * side: _count(plain, side * encoder.patch_size) for side in _SIDES}
    return [_interpolate(samples, number) for number in cells]


def _count(encoder: DenseEncoder, size: int) -> int:
    image = torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device)
    with torch.no_grad(), _Attention() as attention, FlopCounterMode(display=False) as counter:
        encoder(image)
    counts = counter.get_flop_counts()["Global"]
    return attention.flops + sum(counts.get(operator, 0) for operator in _COUNTED)


class _Attention(TorchFunctionMode):
    """Counts attention by its inputs, because not all fused implementations are known to PyTorch's counter."""

    flops = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        return func(*args, **(kwargs or {}))


def _interpolate(samples: dict[int, int], x: int) -> int:
    """Evaluate the polynomial through the known points at ``x`` (Lagrange interpolation in exact arithmetic)."""
    total = Fraction(0)
    for point, value in samples.items():
        total += value * math.prod(Fraction(x - other, point - other) for other in samples if other != point)
    return int(total)
