"""Checks of the tensors that are refined."""

from __future__ import annotations

import math

import torch


def check_tensor(name: str, tensor: torch.Tensor, layout: str) -> None:
    """Check dtype and number of dimensions of a tensor, and that none but the first or last dimension is empty.

    Args:
        name: name of the argument, for messages.
        tensor: the argument.
        layout: names of its dimensions, such as "(Q, H, W)". "Q" may be 0, all others are at least 1.

    Raises:
        ValueError: the tensor does not have this layout, or no floating-point dtype.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a floating-point tensor {layout}, got {got}")
    dimensions = layout.strip("()").split(", ")
    if tensor.ndim != len(dimensions) or any(n < 1 and side != "Q" for n, side in zip(tensor.shape, dimensions)):
        raise ValueError(f"{name} must have shape {layout} with sides of at least 1, got {tuple(tensor.shape)}")


def check_device(name: str, tensor: torch.Tensor, other: str, device: torch.device) -> None:
    """Check that a tensor is on the device of another one.

    Raises:
        ValueError: it is not.
    """
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {other}, {device}, got {tensor.device}: move it with .to()")


def finite_ranges(**tensors: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of tensors by argument name. A GPU is waited for once.

    Args:
        tensors: floating-point tensors by argument name, on one device; those without values are left out.

    Raises:
        ValueError: a tensor has NaN or infinite values.
    """
    full = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel()}
    if not full:
        return {}
    # aminmax reads a tensor once and propagates NaN.
    ends = iter(torch.stack([end.float() for tensor in full.values() for end in tensor.aminmax()]).tolist())
    ranges = dict(zip(full, zip(ends, ends)))
    for name, (lowest, highest) in ranges.items():
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return ranges
