"""Size policies, which pad, stretch or crop images to whole patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spar_d2.encoders.symbolic import is_symbolic


class Pad:
    """Pads images with zeros at the right and bottom.

    Args:
        patch_size: side of a patch in pixels.
    """

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of patches (h, w) for an image size in pixels."""
        if not is_symbolic((height, width)):
            # In tracing, the sides are tensors.
            height, width = int(height), int(width)
        # Rounded up by a quotient of positive numbers: ONNX divides toward zero.
        rows, columns = (side + self.patch_size - 1 for side in (height, width))
        return rows // self.patch_size, columns // self.patch_size

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Resize (B, 3, H, W) to (B, 3, h * p, w * p). Images of whole patches are returned unchanged."""
        rows, columns = self.grid(x.shape[-2], x.shape[-1])
        size = (rows * self.patch_size, columns * self.patch_size)
        return self._resize(x, size) if is_symbolic(size) or x.shape[-2:] != size else x

    def _resize(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))


class Stretch(Pad):
    """Stretches images to the next multiple of the patch size, with bicubic interpolation."""

    def _resize(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


class Crop(Pad):
    """Crops partial patches at the right and bottom."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of patches (h, w). Raises ``ValueError`` if the image is smaller than a patch."""
        grid = (int(height) // self.patch_size, int(width) // self.patch_size)
        if 0 in grid:
            raise ValueError(
                f"with reference_compat, images must be at least one patch ({self.patch_size} pixels) large, "
                f"got {height}x{width}"
            )
        return grid

    def _resize(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return x[..., : size[0], : size[1]]


def check_images(x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is a floating-point tensor (B, 3, H, W) with B, H, W >= 1."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"images must be a floating-point RGB tensor (B, 3, H, W), got {got}")
    if 0 in x.shape:
        raise ValueError(f"images must have at least one pixel, got {tuple(x.shape)}")
