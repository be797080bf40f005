"""From an input's image to the dense map that a segmentor reads, in a single pass or by a sliding window."""

from __future__ import annotations

import torch

from spar_d2.modeling.backbone import SPARViT
from spar_d2.teacher import sliding_window_features
from spar_d2.teacher.sliding import check_window

INFERENCES = ("single_pass", "sliding_window")


class DenseInference:
    """Mixed into segmentors, which have ``backbone``, ``pixel_mean`` and ``pixel_std``, and call :meth:`_infer_by`."""

    backbone: SPARViT
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def _infer_by(self, inference: str, window: int, stride: int, window_batch: int) -> None:
        """Choose how images are encoded.

        Args:
            inference: "single_pass" or "sliding_window".
            window, stride, window_batch: of the sliding window; window 0 is the encoder's native size, window_batch 0
                is chosen by it.

        Raises:
            ValueError: an argument that is not allowed.
        """
        check_choice("INFERENCE", inference, INFERENCES)
        self.inference = inference
        self.windows = check_window(self.backbone.encoder, window, stride, window_batch)

    def encoder_input(self, image: torch.Tensor) -> torch.Tensor:
        """What the encoder is given for an image: (3, H, W) in ``INPUT.FORMAT``, 0..255, to (1, 3, H, W)."""
        return self.backbone.convert(self._normalize(image)[None])

    def dense_maps(self, x: torch.Tensor) -> torch.Tensor:
        """What is read: images (B, 3, H, W) as the encoder takes them to (B, D, ceil(H / p), ceil(W / p))."""
        if self.inference == "single_pass":
            return self.backbone.encoder(x)
        return sliding_window_features(self.backbone.encoder, x, *self.windows)

    def _normalize(self, image: torch.Tensor) -> torch.Tensor:
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f'"image" must be (3, H, W), in the order of INPUT.FORMAT; got {tuple(image.shape)}')
        # As they are, usually one byte a value: cast on the device, and without waiting where memory is pinned.
        pixels = image.to(self.pixel_mean.device, non_blocking=True).to(self.pixel_mean.dtype)
        return (pixels - self.pixel_mean) / self.pixel_std


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` where a key of ``MODEL.SPAR`` has a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"MODEL.SPAR.{key} must be one of {', '.join(allowed)}; got {value!r}")
