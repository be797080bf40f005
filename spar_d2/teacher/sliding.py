"""Dense features by a sliding window: encode windows at the pre-training size, stitch their features by averaging."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.base import check_images
from spar_d2.encoders.image_sizes import Crop
from spar_d2.teacher.stitch import stitch
from spar_d2.teacher.windows import WindowPlan


@dataclass(frozen=True)
class SampledTarget:
    """What a few random windows say about the stitched target, right on average.

    Attributes:
        weighted_sum: (B, D, h, w) float32, its mean over all draws is the full target.
        weight: (B, 1, h, w) float32, how much the windows drawn say about each cell; 0 where they say nothing. Its
            mean over all draws is 1.
    """

    weighted_sum: torch.Tensor
    weight: torch.Tensor


class SlidingWindowTeacher(nn.Module):
    """A frozen copy of an encoder that sees an image through a sliding window.

    It computes in the encoder's own precision (:meth:`DenseEncoder.accelerate`), also within ``torch.autocast``; in
    "bfloat16" its weights are in bfloat16 too (:meth:`DenseEncoder.freeze`).

    Args:
        encoder: copied; later changes to it do not reach the teacher.
        window: side of the window in pixels, a multiple of the patch; None is the encoder's ``native_size``.
        stride: step in pixels, 1..window.
        batch_size: windows encoded at once, of all images; bounds the memory. 0 chooses by the tokens of a window and
            the device.

    Raises:
        ValueError: a window or stride that the encoder cannot be used with.
    """

    def __init__(self, encoder: DenseEncoder, window: int | None = None, stride: int = 24, batch_size: int = 0) -> None:
        super().__init__()
        self.window, self.stride, self.batch_size = check_window(encoder, window, stride, batch_size)
        self.encoder = copy.deepcopy(encoder).freeze(fixed_shape=True)
        self.eval()

    def train(self, mode: bool = True) -> SlidingWindowTeacher:
        """Always stays in eval mode."""
        return super().train(False)

    def plan(self, height: int, width: int) -> WindowPlan:
        """The windows of an image of the given size in pixels."""
        return plan_windows(self.encoder, height, width, self.window, self.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The full target, see :func:`sliding_window_features`."""
        check_images(x)
        return torch.cat(self.targets(x.unbind()))

    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The full targets (1, D, h, w) of images (3, H, W) of any sizes, whose windows are encoded together.

        Raises:
            ValueError: no images.
        """
        _check_any(images)
        picks, factors = zip(*(_every_window(self.plan(*image.shape[-2:])) for image in images))
        return [sample.weighted_sum for sample in self._encode_windows(images, picks, factors)]

    def samples(self, images: Sequence[torch.Tensor], windows: int, shifts: torch.Tensor) -> list[SampledTarget]:
        """Encode a few windows of each image, at random but evenly spread over it.

        Args:
            images: (3, H, W) each, of any sizes, as for the encoder.
            windows: windows per image, at least 1; as many as an image's plan has, or more, means all of them once.
            shifts: (B, 2), random numbers in 0..1, two for each image, which decide what is drawn.

        Returns:
            A target of one image, (1, ...), for each.

        Raises:
            ValueError: no images, or ``windows`` is below 1.
        """
        _check_any(images)
        if windows < 1:
            raise ValueError(f"windows must be at least 1, got {windows}")

        def draw(plan: WindowPlan, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if windows >= len(plan):
                return _every_window(plan)
            picks = plan.spread(windows, shift[None])[0]
            # A window that is drawn rarely counts for more when it is (Horvitz and Thompson, 1952).
            return picks, 1 / (windows * plan.probability[picks])

        plans = (self.plan(*image.shape[-2:]) for image in images)
        picks, factors = zip(*map(draw, plans, shifts))
        return self._encode_windows(images, picks, factors)

    def sample(self, x: torch.Tensor, windows: int, generator: torch.Generator | None = None) -> SampledTarget:
        """:meth:`samples` of images of one size (B, 3, H, W), with the shifts drawn from a CPU generator.

        Raises:
            ValueError: ``windows`` is below 1, or ``x`` has another form.
        """
        check_images(x)
        return _together(self.samples(x.unbind(), windows, torch.rand(len(x), 2, generator=generator)))

    def encode_windows(self, x: torch.Tensor, picks: torch.Tensor, factors: torch.Tensor) -> SampledTarget:
        """Encode chosen windows of images of one size.

        Args:
            x: (B, 3, H, W) as for the encoder.
            picks: (B, k) int64, numbers of windows in each image's plan.
            factors: (B, k), how often each counts.
        """
        return _together(self._encode_windows(x.unbind(), picks.unbind(), factors.unbind()))

    def _encode_windows(
        self, images: Sequence[torch.Tensor], picks: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]
    ) -> list[SampledTarget]:
        # Its own precision, whatever that of the training around it: targets can be kept and compared.
        with torch.autocast(images[0].device.type, enabled=False):
            return _encode(self.encoder, images, self.window, self.stride, picks, factors, self.batch_size)


def sliding_window_features(
    encoder: DenseEncoder, x: torch.Tensor, window: int | None = None, stride: int = 24, batch_size: int = 0
) -> torch.Tensor:
    """Features of all windows, refined, averaged where windows overlap, and brought back to the patch grid.

    Args:
        encoder: used as it is, without gradients.
        x: (B, 3, H, W) as for the encoder, any size; images smaller than the window are padded with zeros.
        window, stride, batch_size: as for :class:`SlidingWindowTeacher`.

    Returns:
        (B, D, ceil(H / p), ceil(W / p)) float32; floor instead of ceil with ``reference_compat``, whatever
        the encoder itself does then.

    Raises:
        ValueError: arguments out of range.
    """
    window, stride, batch_size = check_window(encoder, window, stride, batch_size)
    check_images(x)
    picks, factors = _every_window(plan_windows(encoder, x.shape[-2], x.shape[-1], window, stride))
    samples = _encode(encoder, x.unbind(), window, stride, [picks] * len(x), [factors] * len(x), batch_size)
    return _together(samples).weighted_sum


def check_window(encoder: DenseEncoder, window: int | None, stride: int, batch_size: int) -> tuple[int, int, int]:
    """Fill in the default window and check the three numbers; ``ValueError`` names the config key that is wrong."""
    window, patch = window or encoder.native_size, encoder.patch_size
    if window < patch or window % patch:
        raise ValueError(
            f"window (SPAR.TEACHER.WINDOW) must be a multiple of the patch size {patch}, at least {patch}; got {window}"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride (SPAR.TEACHER.STRIDE) must be in 1..{window} (the window), got {stride}")
    if batch_size < 0:
        raise ValueError(
            f"batch_size (SPAR.TEACHER.BATCH_SIZE) must be at least 1, or 0 to choose by the window, got {batch_size}"
        )
    return window, stride, batch_size


def target_grid(encoder: DenseEncoder, height: int, width: int) -> tuple[int, int]:
    """Size of the stitched map for an image of the given size in pixels."""
    policy = Crop(encoder.patch_size) if encoder.reference_compat else encoder.size_policy
    return policy.grid(height, width)


def plan_windows(encoder: DenseEncoder, height: int, width: int, window: int, stride: int) -> WindowPlan:
    """Plan over the image as the encoder pads it, and at least one window large."""
    patch = encoder.patch_size
    if not encoder.reference_compat:
        height, width = (cells * patch for cells in encoder.grid(height, width))
    return _plan(max(height, window), max(width, window), window, stride, patch)


# A step asks for the plan of its images several times, and sizes come back.
_plan = functools.lru_cache(maxsize=64)(WindowPlan)


def _check_any(images: Sequence[torch.Tensor]) -> None:
    if not len(images):
        raise ValueError("images must have at least one image (3, H, W), got none")


def _every_window(plan: WindowPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of all windows, and how often each counts: once."""
    return torch.arange(len(plan)), torch.ones(len(plan), dtype=torch.float64)


@torch.no_grad()
def _encode(
    encoder: DenseEncoder,
    images: Sequence[torch.Tensor],
    window: int,
    stride: int,
    picks: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    batch_size: int,
) -> list[SampledTarget]:
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    plans = [plan_windows(encoder, *size, window, stride) for size in sizes]
    grids = [target_grid(encoder, *size) for size in sizes]
    stitched = stitch(encoder, images, plans, picks, factors, batch_size)
    return [
        SampledTarget(*(part[..., : grid[0], : grid[1]].contiguous() for part in parts))
        for parts, grid in zip(stitched, grids)
    ]


def _together(samples: Sequence[SampledTarget]) -> SampledTarget:
    """Targets of images of one size as one."""
    return SampledTarget(torch.cat([s.weighted_sum for s in samples]), torch.cat([s.weight for s in samples]))
