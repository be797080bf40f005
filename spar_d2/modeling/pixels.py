"""From the pixels that a framework normalized to those that an encoder was trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class PixelConversion(nn.Module):
    """Undoes a framework's normalization and applies an encoder's, in one multiplication and one addition.

    Args:
        mean, std: what the framework normalized with, three numbers in the order of its channels, for pixels in 0..255
            (``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD``).
        format: order of the framework's channels, "RGB" or "BGR" (``INPUT.FORMAT``).
        encoder_mean, encoder_std: what the encoder wants, RGB, for pixels in 0..1.

    Raises:
        ValueError: another format, not three numbers, or a deviation that is not positive.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        format: str,
        encoder_mean: Sequence[float],
        encoder_std: Sequence[float],
    ) -> None:
        super().__init__()
        if format not in ("RGB", "BGR"):
            raise ValueError(f'INPUT.FORMAT must be "RGB" or "BGR", got {format!r}')
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be three numbers each, deviations above 0; "
                f"got {list(mean)} and {list(std)}"
            )
        self.flip = format == "BGR"
        order = [2, 1, 0] if self.flip else [0, 1, 2]
        undone, divided = (torch.tensor(values, dtype=torch.float64)[order] / 255 for values in (mean, std))
        center, deviation = (torch.tensor(values, dtype=torch.float64) for values in (encoder_mean, encoder_std))
        scale, shift = divided / deviation, (undone - center) / deviation
        self.register_buffer("scale", scale.float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalized by the framework, to RGB normalized for the encoder."""
        if self.flip:
            x = x.flip(1)
        return x * self.scale + self.shift
