"""Size policies: how an image of any size becomes one of whole patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class Pad:
    """Pads with zeros at the right and bottom.

    Args:
        patch_size: side of a patch in pixels.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Numbers of patches (h, w) of an image with sides in pixels."""
        # Sides of a traced tensor are tensors.
        return math.ceil(int(height) / self.patch_size), math.ceil(int(width) / self.patch_size)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 3, h * p, w * p); the tensor itself where it has whole patches."""
        rows, columns = self.grid(x.shape[-2], x.shape[-1])
        size = (rows * self.patch_size, columns * self.patch_size)
        return x if x.shape[-2:] == size else self._resize(x, size)

    def _resize(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))


class Stretch(Pad):
    """Enlarges the image bicubically."""

    def _resize(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


class Crop(Pad):
    """Drops the remainder of a patch at the right and bottom."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """As for the others; raises ``ValueError`` where an image is smaller than a patch."""
        grid = (int(height) // self.patch_size, int(width) // self.patch_size)
        if 0 in grid:
            raise ValueError(
                f"with reference_compat an image must cover a patch of {self.patch_size} pixels, got {height}x{width}"
            )
        return grid

    def _resize(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return x[..., : size[0], : size[1]]
