"""Sliding-window features: windows of the pre-training size are encoded, and their features averaged."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.image_sizes import Crop, Pad, check_images
from spar_d2.teacher.keys import encoder_key
from spar_d2.teacher.stitch import WindowSelection, stitch
from spar_d2.teacher.windows import WindowPlan


@dataclass(frozen=True)
class SampledTarget:
    """Unbiased estimate of the stitched target from a random subset of windows.

    Attributes:
        weighted_sum: (B, D, h, w) float32 estimate; its expected value is the full target.
        weight: (B, 1, h, w) float32 contribution of the sampled windows to each grid cell; 0 if no sampled window
            covers the cell. Its expected value is 1.
        windows: number of windows that were encoded for it.
    """

    weighted_sum: torch.Tensor
    weight: torch.Tensor
    windows: int = 0


class SlidingWindowTeacher(nn.Module):
    """A frozen copy of an encoder that is applied to images in a sliding window.

    The teacher uses the precision of the encoder (:meth:`DenseEncoder.accelerate`), even within ``torch.autocast``. In
    "bfloat16", its weights are also bfloat16 (:meth:`DenseEncoder.freeze`).

    Args:
        encoder: encoder to copy.
        window: side of the window in pixels, a multiple of the patch size; None means ``encoder.native_size``.
        stride: stride of the window in pixels, 1..window.
        batch_size: number of windows per forward pass, over all images; it bounds the memory. 0 chooses it by device
            and tokens per window.

    Raises:
        ValueError: ``window``, ``stride`` or ``batch_size`` is invalid.
    """

    linear = True

    def __init__(self, encoder: DenseEncoder, window: int | None = None, stride: int = 24, batch_size: int = 0) -> None:
        super().__init__()
        self.window, self.stride, self.batch_size = check_window(encoder, window, stride, batch_size)
        self.encoder = copy.deepcopy(encoder).freeze(fixed_shape=True)
        self.eval()

    def train(self, mode: bool = True) -> SlidingWindowTeacher:
        """Do nothing: the teacher always stays in eval mode."""
        return super().train(False)

    def plan(self, height: int, width: int) -> WindowPlan:
        """Return the window plan for an image size in pixels."""
        return plan_windows(self.encoder, height, width, self.window, self.stride)

    def identity(self) -> str:
        """Return a hash of window, stride, precision, architecture and weights."""
        return encoder_key(self.encoder, self.window, self.stride)

    def cost(self, height: int, width: int, windows: int = 0) -> int:
        """Return the number of windows that are encoded for an image; see :class:`~spar_d2.teacher.DenseTeacher`."""
        planned = len(self.plan(height, width))
        return min(planned, windows or planned)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the full target, see :func:`sliding_window_features`."""
        check_images(x)
        return torch.cat(self.targets(x.unbind()))

    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the full targets (1, D, h, w) of images (3, H, W) of any sizes.

        Windows of different images share forward passes.

        Raises:
            ValueError: ``images`` is empty.
        """
        _check_any(images)
        parts = [WindowSelection.of_all(self.plan(*image.shape[-2:])) for image in images]
        return [sample.weighted_sum for sample in self._encode_windows(images, parts)]

    def samples(self, images: Sequence[torch.Tensor], windows: int, shifts: torch.Tensor) -> list[SampledTarget]:
        """Encode randomly sampled, evenly spread windows of each image.

        Args:
            images: images (3, H, W) of any sizes, normalized for the encoder.
            windows: number of windows per image, at least 1. If an image has at most this many windows, all of them are
                used once.
            shifts: (B, 2) random numbers in 0..1 that determine the sampled windows, two per image.

        Returns:
            A target (1, ...) for each image.

        Raises:
            ValueError: ``images`` is empty, or ``windows`` is less than 1.
        """
        _check_any(images)
        if windows < 1:
            raise ValueError(f"windows must be at least 1, got {windows}")

        def draw(image: torch.Tensor, shift: torch.Tensor) -> WindowSelection:
            plan = self.plan(*image.shape[-2:])
            if windows >= len(plan):
                return WindowSelection.of_all(plan)
            picks = plan.spread(windows, shift[None])[0]
            # Weight by inverse probability for an unbiased estimate (Horvitz and Thompson, 1952).
            return WindowSelection(plan, picks, 1 / (windows * plan.probability[picks]))

        return self._encode_windows(images, list(map(draw, images, shifts)))

    def sample(self, x: torch.Tensor, windows: int, generator: torch.Generator | None = None) -> SampledTarget:
        """Apply :meth:`samples` to images of one size, with random shifts.

        Args:
            x: (B, 3, H, W), normalized for the encoder.
            windows: number of windows per image.
            generator: CPU generator of the shifts.

        Raises:
            ValueError: ``windows`` is less than 1, or ``x`` has the wrong shape or dtype.
        """
        check_images(x)
        return _together(self.samples(x.unbind(), windows, torch.rand(len(x), 2, generator=generator)))

    def encode_windows(self, x: torch.Tensor, picks: torch.Tensor, factors: torch.Tensor) -> SampledTarget:
        """Encode selected windows of images of one size.

        Args:
            x: (B, 3, H, W), normalized for the encoder.
            picks: (B, k) int64 window indices in the plan of each image.
            factors: (B, k) weights of the windows.
        """
        plan = self.plan(*x.shape[-2:])
        parts = [WindowSelection(plan, *part) for part in zip(picks, factors)]
        return _together(self._encode_windows(x.unbind(), parts))

    def _encode_windows(self, images: Sequence[torch.Tensor], parts: Sequence[WindowSelection]) -> list[SampledTarget]:
        # Autocast of the training must not affect the targets, so that they can be cached.
        with torch.autocast(images[0].device.type, enabled=False):
            return _encode(self.encoder, images, parts, self.batch_size)


def sliding_window_features(
    encoder: DenseEncoder, x: torch.Tensor, window: int | None = None, stride: int = 24, batch_size: int = 0
) -> torch.Tensor:
    """Compute sliding-window features.

    The features of all windows are upsampled to a fine grid, averaged where windows overlap, and downsampled to the
    patch grid.

    Args:
        encoder: encoder; it runs without gradients.
        x: (B, 3, H, W) of any size, normalized for the encoder. Images smaller than the window are padded with zeros.
        window, stride, batch_size: see :class:`SlidingWindowTeacher`.

    Returns:
        (B, D, ceil(H / p), ceil(W / p)) float32; with ``reference_compat``, floor instead of ceil for all encoders.

    Raises:
        ValueError: an argument is invalid.
    """
    window, stride, batch_size = check_window(encoder, window, stride, batch_size)
    check_images(x)
    part = WindowSelection.of_all(plan_windows(encoder, x.shape[-2], x.shape[-1], window, stride))
    return _together(_encode(encoder, x.unbind(), [part] * len(x), batch_size)).weighted_sum


def check_window(encoder: DenseEncoder, window: int | None, stride: int, batch_size: int) -> tuple[int, int, int]:
    """Validate window, stride and batch size, and return them with the default window filled in.

    Raises:
        ValueError: a value is invalid; the message contains its config key.
    """
    window, patch = window or encoder.native_size, encoder.patch_size
    if window < patch or window % patch:
        raise ValueError(
            f"window (SPAR.TEACHER.WINDOW) must be a positive multiple of the patch size {patch}; got {window}"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride (SPAR.TEACHER.STRIDE) must be in 1..{window} (the window), got {stride}")
    if batch_size < 0:
        raise ValueError(f"batch_size (SPAR.TEACHER.BATCH_SIZE) must be at least 1, or 0 (automatic), got {batch_size}")
    return window, stride, batch_size


def target_grid(encoder: DenseEncoder, height: int, width: int) -> tuple[int, int]:
    """Return the size of the stitched feature map for an image size in pixels."""
    return target_policy(encoder).grid(height, width)


def target_policy(encoder: DenseEncoder) -> Pad:
    """Return the policy that pads or crops images to the patches of the stitched feature map."""
    return Crop(encoder.patch_size) if encoder.reference_compat else encoder.size_policy


def plan_windows(encoder: DenseEncoder, height: int, width: int, window: int, stride: int) -> WindowPlan:
    """Return the window plan for an image after padding by the encoder, at least one window large."""
    patch = encoder.patch_size
    if not encoder.reference_compat:
        height, width = (cells * patch for cells in encoder.grid(height, width))
    return _plan(max(height, window), max(width, window), window, stride, patch)


# Image sizes repeat, and plans keep their tensors.
_plan = functools.lru_cache(maxsize=64)(WindowPlan)


def _check_any(images: Sequence[torch.Tensor]) -> None:
    if not len(images):
        raise ValueError("images must have at least one image (3, H, W), got none")


@torch.no_grad()
def _encode(
    encoder: DenseEncoder, images: Sequence[torch.Tensor], parts: Sequence[WindowSelection], batch_size: int
) -> list[SampledTarget]:
    targets = []
    for image, part, sums in zip(images, parts, stitch(encoder, images, parts, batch_size)):
        rows, columns = target_grid(encoder, image.shape[-2], image.shape[-1])
        weighted_sum, weight = (each[..., :rows, :columns].contiguous() for each in sums)
        targets.append(SampledTarget(weighted_sum, weight, len(part)))
    return targets


def _together(samples: Sequence[SampledTarget]) -> SampledTarget:
    """Concatenate the targets of images of one size."""
    sums, weights = ([getattr(s, name) for s in samples] for name in ("weighted_sum", "weight"))
    return SampledTarget(torch.cat(sums), torch.cat(weights), sum(s.windows for s in samples))
