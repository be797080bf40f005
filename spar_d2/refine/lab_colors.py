"""Conversion of sRGB colors to CIE Lab."""

from __future__ import annotations

import torch

# Linear sRGB to XYZ, and the white point D65. LPOSS uses these roundings: more digits change its weights visibly.
_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)


def scaled_lab(image: torch.Tensor) -> torch.Tensor:
    """Convert sRGB to CIE Lab, scaled to about -1..1.

    Args:
        image: (3, H, W) float32 RGB in 0..1.

    Returns:
        (3, H, W) float32: L / 100, a / 128, b / 128.
    """
    # Numbers rather than tensors: nothing is copied to a GPU.
    red, green, blue = (_linear(channel) for channel in image)
    x, y, z = (
        _compressed((r / white) * red + (g / white) * green + (b / white) * blue)
        for (r, g, b), white in zip(_TO_XYZ, _WHITE)
    )
    return torch.stack([(116 * y - 16) / 100, (x - y) * (500 / 128), (y - z) * (200 / 128)])


def _linear(value: torch.Tensor) -> torch.Tensor:
    # The clamp keeps the unused branch free of NaN.
    return torch.where(value > 0.04045, ((value.clamp(min=0) + 0.055) / 1.055) ** 2.4, value / 12.92)


def _compressed(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value > 0.008856, value.clamp(min=0) ** (1 / 3), 7.787 * value + 4 / 29)
