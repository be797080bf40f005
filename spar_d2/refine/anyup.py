"""AnyUp: learned upsampling of the features of any encoder, guided by the image.

The method and its weights are by T. Wimmer et al. (arXiv:2510.12764); see NOTICE. This is an implementation for
inference with bounded memory: the output is computed in bands of rows, exactly. Windows are those of the paper, not of
the authors' variant with NATTEN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from spar_d2.encoders.precision import full_float32
from spar_d2.refine.anyup_attention import LocalAttention
from spar_d2.refine.anyup_encoding import encode_image
from spar_d2.refine.anyup_layers import (
    WIDTH,
    CrossDecode,
    Encoder,
    FeatureFilters,
    RotaryPositions,
    convolve,
)
from spar_d2.utils.transfer import send

# Limit of the memory of maps that are kept for later passes.
KEPT_BYTES = 512 << 20


def imagenet_normalized(image: torch.Tensor) -> torch.Tensor:
    """Normalize RGB images (..., 3, H, W) in 0..1 as guidance of :class:`AnyUp`, whatever the encoder's statistics."""
    if image.ndim < 3 or image.shape[-3] != 3 or not image.is_floating_point():
        raise ValueError(
            f"image must be floating-point RGB (..., 3, H, W) in 0..1, got {tuple(image.shape)} {image.dtype}"
        )
    mean, std = (
        send(torch.tensor(values, dtype=image.dtype), image.device).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (image - mean) / std


class AnyUp(nn.Module):
    """Upsamples features to any size, as weighted means of the features around each pixel.

    The weights are random; :func:`spar_d2.refine.load_anyup` reads the published ones. For inference only: outputs have
    no gradients. Example:

        model = load_anyup("anyup_multi_backbone.pth")
        image = imagenet_normalized(pixels)                # (1, 3, H, W); pixels RGB in 0..1
        upsampled = model(image, features, size=(H, W))    # (1, C, h, w) -> (1, C, H, W)

        attention = model.prepare(image, features, (H, W))
        scores = attention.project(text)                   # (1, Q, h, w)
        for rows in attention.bands():                     # labels in bounded memory
            labels[:, rows] = attention.rows(scores, rows).argmax(1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = Encoder(nn.Conv2d(3, WIDTH, 1, bias=False))
        self.key_encoder = Encoder(nn.Conv2d(WIDTH, WIDTH, 1, bias=False))
        self.query_encoder = Encoder(nn.Conv2d(WIDTH, WIDTH, 1, bias=False))
        self.key_features_encoder = Encoder(FeatureFilters())
        self.cross_decode = CrossDecode()
        self.aggregation = Encoder(nn.Conv2d(2 * WIDTH, WIDTH, 3, bias=False))
        self.rope = RotaryPositions()

    @torch.no_grad()
    def forward(self, image: torch.Tensor, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Upsample features.

        Args:
            image: (B, 3, H, W) floating point, RGB with the statistics of ImageNet (:func:`imagenet_normalized`). It
                must show the same area as the features. Its resolution is independent of ``size``.
            features: (B, C, h, w) floating point of any length, h and w at least 2.
            size: (oh, ow) of the output.

        Returns:
            (B, C, oh, ow) in the dtype of ``features``. Computed in float32.

        Raises:
            ValueError: an argument has the wrong shape or dtype, or values that are NaN or infinite.
        """
        _check(image, features, size)
        output = features.new_empty(*features.shape[:2], int(size[0]), int(size[1]))
        for number in range(len(features)):
            one = slice(number, number + 1)
            attention = self._prepare(image[one], features[one], size, KEPT_BYTES)
            for rows in attention.bands():
                output[one, :, rows] = attention.rows(features[one], rows)
        return output

    @torch.no_grad()
    def prepare(
        self, image: torch.Tensor, features: torch.Tensor, size: tuple[int, int], kept_bytes: int = KEPT_BYTES
    ) -> LocalAttention:
        """Prepare the upsampling of features, or of values such as class scores on their grid, in bands of rows.

        Args:
            image, features, size: see :meth:`forward`.
            kept_bytes: limit of the memory that the result keeps. If the image needs more, computing takes longer.

        Raises:
            ValueError: see :meth:`forward`.
        """
        _check(image, features, size)
        return self._prepare(image, features, size, kept_bytes)

    def _prepare(
        self, image: torch.Tensor, features: torch.Tensor, size: tuple[int, int], kept_bytes: int
    ) -> LocalAttention:
        size, grid = (int(size[0]), int(size[1])), (features.shape[2], features.shape[3])
        images = []
        with full_float32(features.device):
            for one, feature in zip(image.float(), features.float()):
                queries, image_keys = encode_image(self, one, grid, kept_bytes // len(features))
                keys = self._keys(image_keys, feature)
                images.append((queries, self.cross_decode.cross_attn.keys(keys)))
            return LocalAttention(self, features, size, (image.shape[2], image.shape[3]), images)

    def _keys(self, image_keys: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Combine the image's part (h * w, 128) of the keys with features (C, h, w)."""
        encoder = self.key_features_encoder
        both = torch.cat([image_keys, encoder.apply_blocks(encoder[0](features))], 1)
        grid = both.T.unflatten(1, features.shape[1:])
        padded = F.pad(grid, (1, 1, 1, 1), mode="reflect").permute(1, 2, 0)
        return self.aggregation.apply_blocks(convolve(padded, self.aggregation[0]).reshape(-1, WIDTH))


def _check(image: torch.Tensor, features: torch.Tensor, size: tuple[int, int]) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f"image must be floating-point (B, 3, H, W), got {tuple(image.shape)} {image.dtype}")
    if features.ndim != 4 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(f"features must be floating-point (B, C, h, w), got {tuple(features.shape)} {features.dtype}")
    if len(image) != len(features) or image.device != features.device:
        raise ValueError(
            "features and image must have the same batch size and device, "
            f"got {len(features)} on {features.device} and {len(image)} on {image.device}"
        )
    if min(features.shape[2:]) < 2:
        raise ValueError(
            f"features must have a grid of at least 2x2, got {features.shape[2]}x{features.shape[3]}; upsample a "
            "single row or column bilinearly"
        )
    if not isinstance(size, Sequence) or len(size) != 2 or any(side != int(side) or side < 1 for side in size):
        raise ValueError(f"size must be a height and a width of at least 1, got {size}")
    # Read together, so that the host waits once.
    finite = torch.stack([image.isfinite().all(), features.isfinite().all()]).tolist()
    for name, is_finite in zip(("image", "features"), finite):
        if not is_finite:
            raise ValueError(f"{name} must be finite, got values that are NaN or infinite")
