"""Dense features by a sliding window: encode windows at the pre-training size, stitch their features by averaging."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.base import check_images
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

    Args:
        encoder: copied; later changes to it do not reach the teacher.
        window: side of the window in pixels, a multiple of the patch; None is the encoder's ``native_size``.
        stride: step in pixels, 1..window.
        batch_size: windows encoded at once; bounds the memory.

    Raises:
        ValueError: a window or stride that the encoder cannot be used with.
    """

    def __init__(
        self, encoder: DenseEncoder, window: int | None = None, stride: int = 24, batch_size: int = 32
    ) -> None:
        super().__init__()
        self.window, self.stride, self.batch_size = check_window(encoder, window, stride, batch_size)
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.eval()

    def train(self, mode: bool = True) -> SlidingWindowTeacher:
        """Always stays in eval mode."""
        return super().train(False)

    def plan(self, height: int, width: int) -> WindowPlan:
        """The windows of an image of the given size in pixels."""
        return plan_windows(self.encoder, height, width, self.window, self.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The full target, see :func:`sliding_window_features`."""
        return sliding_window_features(self.encoder, x, self.window, self.stride, self.batch_size)

    def sample(self, x: torch.Tensor, windows: int, generator: torch.Generator | None = None) -> SampledTarget:
        """Encode a few windows of each image, at random but evenly spread over it.

        Args:
            x: (B, 3, H, W) as for the encoder.
            windows: windows per image, at least 1; as many as the plan has, or more, means all of them once.
            generator: CPU generator that draws them.

        Raises:
            ValueError: ``windows`` is below 1, or ``x`` has another form.
        """
        if windows < 1:
            raise ValueError(f"windows must be at least 1, got {windows}")
        check_images(x)
        plan = self.plan(*x.shape[-2:])
        if windows >= len(plan):
            picks = torch.arange(len(plan)).expand(len(x), -1)
            return self.encode_windows(x, picks, torch.ones(picks.shape))
        picks = plan.spread(windows, torch.rand(len(x), 2, generator=generator))
        # A window that is drawn rarely counts for more when it is (Horvitz and Thompson, 1952).
        return self.encode_windows(x, picks, 1 / (windows * plan.probability[picks]))

    @torch.no_grad()
    def encode_windows(self, x: torch.Tensor, picks: torch.Tensor, factors: torch.Tensor) -> SampledTarget:
        """Encode chosen windows.

        Args:
            x: (B, 3, H, W) as for the encoder.
            picks: (B, k) int64, numbers of windows in each image's plan.
            factors: (B, k), how often each counts.
        """
        plan = self.plan(*x.shape[-2:])
        return SampledTarget(*_stitch(self.encoder, x, plan, picks, factors, self.batch_size))


@torch.no_grad()
def sliding_window_features(
    encoder: DenseEncoder, x: torch.Tensor, window: int | None = None, stride: int = 24, batch_size: int = 32
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
    plan = plan_windows(encoder, x.shape[-2], x.shape[-1], window, stride)
    picks = torch.arange(len(plan)).expand(len(x), -1)
    target, _ = _stitch(encoder, x, plan, picks, torch.ones(picks.shape), batch_size)
    return target


def check_window(encoder: DenseEncoder, window: int | None, stride: int, batch_size: int) -> tuple[int, int, int]:
    """Fill in the default window and check the three numbers; ``ValueError`` names the config key that is wrong."""
    window, patch = window or encoder.native_size, encoder.patch_size
    if window < patch or window % patch:
        raise ValueError(
            f"window (SPAR.TEACHER.WINDOW) must be a multiple of the patch size {patch}, at least {patch}; got {window}"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride (SPAR.TEACHER.STRIDE) must be in 1..{window} (the window), got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size (SPAR.TEACHER.BATCH_SIZE) must be at least 1, got {batch_size}")
    return window, stride, batch_size


def target_grid(encoder: DenseEncoder, height: int, width: int) -> tuple[int, int]:
    """Size of the stitched map for an image of the given size in pixels."""
    if not encoder.reference_compat:
        return encoder.grid(height, width)
    grid = (height // encoder.patch_size, width // encoder.patch_size)
    if 0 in grid:
        raise ValueError(
            f"with reference_compat an image must cover a patch of {encoder.patch_size} pixels, got {height}x{width}"
        )
    return grid


def plan_windows(encoder: DenseEncoder, height: int, width: int, window: int, stride: int) -> WindowPlan:
    """Plan over the image as the encoder pads it, and at least one window large."""
    patch = encoder.patch_size
    if not encoder.reference_compat:
        height, width = (cells * patch for cells in encoder.grid(height, width))
    return _plan(max(height, window), max(width, window), window, stride, patch)


# A step asks for the plan of its images several times, and sizes come back.
_plan = functools.lru_cache(maxsize=64)(WindowPlan)


def _stitch(
    encoder: DenseEncoder,
    x: torch.Tensor,
    plan: WindowPlan,
    picks: torch.Tensor,
    factors: torch.Tensor,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the windows ``picks`` (B, k) of each image and add them up, ``factors`` (B, k) times each.

    Every cell is divided by the count of the FULL plan, whatever the windows picked.

    Returns:
        Sum (B, D, h, w) and the same for ones instead of features (B, 1, h, w).
    """
    batch, _, height, width = x.shape
    padded = F.pad(x, (0, plan.width - width, 0, plan.height - height))
    # A view (B, 3, rows, columns, window, window): indexing it copies the windows of one batch only.
    views = padded.unfold(2, plan.window, 1).unfold(3, plan.window, 1)
    images = torch.arange(batch).repeat_interleave(picks.shape[1])
    windows = picks.reshape(-1)
    factors = factors.reshape(-1, 1).to(x.device, torch.float32)
    cells = plan.counts.numel()
    mosaic = x.new_zeros((batch * cells, encoder.embed_dim), dtype=torch.float32)
    seen = x.new_zeros(batch * cells, dtype=torch.float32)
    for start in range(0, len(windows), batch_size):
        image, window = images[start : start + batch_size], windows[start : start + batch_size]
        tops, lefts = plan.origins[window].unbind(1)
        features = encoder(views[image, :, tops, lefts]).float()
        if plan.factor > 1:
            features = F.interpolate(features, size=(plan.window_cells,) * 2, mode="bilinear", align_corners=False)
        places = (plan.cells_of(window) + image[:, None] * cells).flatten().to(x.device)
        factor = factors[start : start + batch_size]
        # (b, D, c, c) -> (b * c * c, D), the order of `places`.
        features = (features * factor[..., None, None]).permute(0, 2, 3, 1).reshape(len(places), -1)
        mosaic.index_add_(0, places, features)
        seen.index_add_(0, places, factor.expand(-1, plan.window_cells**2).reshape(-1))
    grid = target_grid(encoder, height, width)
    return _to_patches(mosaic, plan, batch, grid), _to_patches(seen[:, None], plan, batch, grid)


def _to_patches(mosaic: torch.Tensor, plan: WindowPlan, batch: int, grid: tuple[int, int]) -> torch.Tensor:
    """Sums (batch * cells, C) to their share of the full plan's mean, at the patches: (batch, C, *grid)."""
    counts = plan.counts.to(mosaic.device).flatten().repeat(batch)
    mosaic = mosaic.div_(counts[:, None]).reshape(batch, *plan.mosaic_size, -1).permute(0, 3, 1, 2)
    patches = (plan.height // plan.patch, plan.width // plan.patch)
    if patches != plan.mosaic_size:
        mosaic = F.interpolate(mosaic, size=patches, mode="bilinear", align_corners=False)
    return mosaic[..., : grid[0], : grid[1]].contiguous()
