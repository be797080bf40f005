"""Encoders as plain modules for export: pixels in 0..255 in; features, scores or labels out; for any size."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from spar_d2.encoders import DenseEncoder


class ExportedEncoder(nn.Module):
    """Dense features of images, with the pixel statistics of the encoder inside.

    Attributes:
        input_names, output_name: names of the inputs and the output in the exported file.

    Args:
        encoder: encoder, which is copied.

    Raises:
        ValueError: the encoder handles image sizes as the reference code (``reference_compat``).
    """

    input_names: tuple[str, ...] = ("image",)
    output_name = "features"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, encoder: DenseEncoder) -> None:
        super().__init__()
        if encoder.reference_compat:
            raise ValueError(
                "MODEL.SPAR.REFERENCE_COMPAT must be False for an export: with True, the result for a size depends on "
                "rules that one file for all sizes cannot hold"
            )
        self.encoder = copy.deepcopy(encoder).cpu().float().accelerate("float32").freeze()
        for name, values in (("mean", encoder.pixel_mean), ("std", encoder.pixel_std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Compute dense features.

        Args:
            image: (B, 3, H, W) float32 RGB in 0..255, of any size.

        Returns:
            (B, D, ceil(H / p), ceil(W / p)) float32.
        """
        return self.encoder((image - self.mean) / self.std)


class ExportedScores(ExportedEncoder):
    """Cosine similarities of dense features and text embeddings."""

    input_names = ("image", "text")
    output_name = "scores"

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Compute scores.

        Args:
            image: (B, 3, H, W) float32 RGB in 0..255, of any size.
            text: (Q, D) float32 unit vectors.

        Returns:
            (B, Q, ceil(H / p), ceil(W / p)) float32 in -1..1.
        """
        features = F.normalize(super().forward(image), dim=1)
        return torch.einsum("bdhw,qd->bqhw", features, text)


class ExportedLabels(ExportedScores):
    """The class of every pixel."""

    input_names = ("image", "text", "query_class")
    output_name = "labels"

    def forward(self, image: torch.Tensor, text: torch.Tensor, query_class: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Label pixels by bilinear interpolation of the scores.

        Args:
            image: (B, 3, H, W) float32 RGB in 0..255, of any size.
            text: (Q, D) float32 unit vectors.
            query_class: (Q,) int64, class of each vector.

        Returns:
            (B, H, W) int64, the class of the vector with the largest score.
        """
        scores = super().forward(image, text)
        # Two small matrix products, because operators that resize differ between libraries.
        rows, columns = (self._interpolation(image.shape[i], scores.shape[i]) for i in (2, 3))
        return query_class[(rows @ scores @ columns.T).argmax(1)]

    def _interpolation(self, pixels: int, cells: int) -> torch.Tensor:
        """Return (pixels, cells): weights of bilinear interpolation from centers of patches to centers of pixels."""
        position = (torch.arange(pixels) + 0.5) / self.encoder.patch_size - 0.5
        distance = position.clamp(min=0)[:, None].minimum(torch.tensor(cells - 1.0)) - torch.arange(cells)
        return (1 - distance.abs()).clamp(min=0)


EXPORTED: dict[str, type[ExportedEncoder]] = {
    module.output_name: module for module in (ExportedEncoder, ExportedScores, ExportedLabels)
}
