"""Mixin that computes the dense feature map of an image: in a single pass, with a sliding window, or by a teacher."""

from __future__ import annotations

import torch

from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.image_segmentor import INFERENCES
from spar_d2.teacher import DenseTeacher, sliding_window_features
from spar_d2.teacher.sliding import check_window

TEACHER = "teacher"


class DenseInference:
    """Mixin for segmentors with ``backbone``, ``pixel_mean``, ``pixel_std``; they call :meth:`_set_inference_mode`."""

    backbone: SPARViT
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def _set_inference_mode(
        self, inference: str, window: int, stride: int, window_batch: int, teacher: DenseTeacher | None = None
    ) -> None:
        """Choose the inference mode.

        Args:
            inference: "single_pass", "sliding_window" or, if there is a teacher, "teacher".
            window, stride, window_batch: settings of the sliding window. A window of 0 means the pre-training image
                size of the encoder; a window_batch of 0 is chosen from the window size.
            teacher: computes the features in the mode "teacher", instead of the encoder of the backbone.

        Raises:
            ValueError: an argument has an invalid value.
        """
        check_choice("INFERENCE", inference, INFERENCES if teacher is None else (*INFERENCES, TEACHER))
        self.inference = inference
        # In a tuple, because the weights of the teacher do not belong to the segmentor.
        self._teacher: tuple[DenseTeacher, ...] = (teacher,) if teacher is not None else ()
        # With mean 0 and standard deviation 1, as in our configs, only the encoder's normalization remains.
        self._normalizes = bool(self.pixel_mean.any() or (self.pixel_std != 1).any())
        self.windows = check_window(self.backbone.encoder, window, stride, window_batch)

    def encoder_input(self, image: torch.Tensor) -> torch.Tensor:
        """Convert an image (3, H, W) in ``INPUT.FORMAT``, 0..255, to encoder input (1, 3, H, W)."""
        return self.backbone.convert(self._normalize(image)[None])

    def dense_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Compute feature maps (B, D, ceil(H / p), ceil(W / p)) of encoder input (B, 3, H, W)."""
        if self.inference == "single_pass":
            return self.backbone.encoder(x)
        if self.inference == TEACHER:
            return torch.cat(self._teacher[0].targets(list(x)))
        return sliding_window_features(self.backbone.encoder, x, *self.windows)

    def _normalize(self, image: torch.Tensor) -> torch.Tensor:
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f'"image" must be (3, H, W), in the order of INPUT.FORMAT; got {tuple(image.shape)}')
        # Images are usually uint8: copy them as they are and cast on the device. Pinned memory is copied
        # asynchronously.
        pixels = image.to(self.pixel_mean.device, non_blocking=True).to(self.pixel_mean.dtype)
        return (pixels - self.pixel_mean) / self.pixel_std if self._normalizes else pixels


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if the value of a key of ``MODEL.SPAR`` is not allowed."""
    if value not in allowed:
        raise ValueError(f"MODEL.SPAR.{key} must be one of {', '.join(allowed)}; got {value!r}")
