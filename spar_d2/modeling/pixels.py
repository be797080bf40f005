"""Converts pixels from the normalization of a framework to that of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class PixelConversion(nn.Module):
    """Undoes a framework's normalization and applies the encoder's, with one multiplication and one addition.

    Args:
        mean, std: pixel statistics that the framework normalizes with, three numbers in its channel order, for pixels
            in 0..255 (``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD``).
        format: channel order of the framework, "RGB" or "BGR" (``INPUT.FORMAT``).
        encoder_mean, encoder_std: pixel statistics of the encoder, RGB, for pixels in 0..1.

    Raises:
        ValueError: the format is unknown, or the statistics are not three numbers each with positive deviations.
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
                "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be three numbers each, standard deviations above 0; "
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
        """Convert (B, 3, H, W) from the framework's normalization to RGB in the encoder's normalization."""
        if self.flip:
            x = x.flip(1)
        return x * self.scale + self.shift
