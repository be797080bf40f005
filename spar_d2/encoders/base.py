"""What every dense image encoder offers, whatever library its weights come from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class DenseEncoder(nn.Module, ABC):
    """A ViT that gives one feature per patch, for images of any size.

    Attributes:
        patch_size: side of a patch in pixels.
        embed_dim: channels D of the dense features.
        width: channels C of the intermediate features.
        native_size: side of the square images that the model was pre-trained on, in pixels.
        pixel_mean, pixel_std: three floats each, RGB, for pixels in 0..1.
        reference_compat: cut images to whole patches, as the authors' code does, instead of padding them.
    """

    patch_size: int
    embed_dim: int
    width: int
    native_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    reference_compat: bool = False

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""

    @abstractmethod
    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, h * p, w * p) to (B, D, h, w)."""

    @abstractmethod
    def _encode_intermediates(self, x: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        """(B, 3, h * p, w * p) to one (B, C, h, w) for each of the (non-negative, ascending) block indices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dense features of the last layer in the space of the text vectors, not normalised.

        Args:
            x: (B, 3, H, W) floating point, RGB, normalised with ``pixel_mean`` and ``pixel_std``; any H, W >= 1.
                The right and bottom are padded with zeros to whole patches.

        Returns:
            (B, D, ceil(H / p), ceil(W / p)); floor instead of ceil with ``reference_compat``.

        Raises:
            ValueError: ``x`` has another shape or type, or (``reference_compat`` only) is smaller than a patch.
        """
        return self._encode(self.to_whole_patches(x))

    def intermediates(self, x: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        """Output of chosen blocks as maps (B, C, h, w), in the order of ``indices``; negative ones count from the end.

        Raises:
            ValueError: an index that is no block's, or as for :meth:`forward`.
        """
        count = len(self.blocks)
        wrong = [i for i in indices if not -count <= i < count]
        if wrong or not indices:
            raise ValueError(f"indices must be block numbers in {-count}..{count - 1}, got {list(indices)}")
        chosen = [i % count for i in indices]
        maps = self._encode_intermediates(self.to_whole_patches(x), sorted(set(chosen)))
        by_index = dict(zip(sorted(set(chosen)), maps))
        return [by_index[i] for i in chosen]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Size of the feature map for an image of the given size in pixels."""
        if self.reference_compat:
            return height // self.patch_size, width // self.patch_size
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def to_whole_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Check ``x`` and pad it with zeros (cut it with ``reference_compat``) at the right and bottom."""
        check_images(x)
        height, width = (cells * self.patch_size for cells in self.grid(*x.shape[-2:]))
        if height == 0 or width == 0:
            raise ValueError(
                f"with reference_compat an image must cover a patch of {self.patch_size} pixels, "
                f"got {x.shape[-2]}x{x.shape[-1]}"
            )
        if self.reference_compat:
            return x[..., :height, :width]
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    def train(self, mode: bool = True) -> DenseEncoder:
        """Stays in eval mode where nothing is trainable: a frozen encoder must not change with its surroundings."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))


def find_encoder(model: nn.Module) -> DenseEncoder:
    """The one dense encoder inside a model.

    Raises:
        RuntimeError: there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, DenseEncoder)]
    if len(found) != 1:
        raise RuntimeError(
            f"a model with one SPAR encoder is needed, found {len(found)}; "
            "set MODEL.BACKBONE.NAME to SPARViT or SPARPyramid"
        )
    return found[0]


def check_images(x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is (B, 3, H, W) floating point with B, H, W >= 1."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"images must be a floating-point RGB tensor (B, 3, H, W), got {got}")
    if 0 in x.shape:
        raise ValueError(f"images must have at least one pixel, got {tuple(x.shape)}")
