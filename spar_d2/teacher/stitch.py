"""Encodes windows of several images in common batches, and sums their features at their positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.precision import full_float32
from spar_d2.teacher.windows import WindowPlan
from spar_d2.utils.transfer import send

# Tokens per batch: enough to utilize a GPU, or few enough for the cache of a CPU.
_TOKENS = {"cpu": 1 << 11, "other": 1 << 15}
# With a fixed shape, the batch size is a multiple of this number of windows.
_STEP = 16


def windows_at_once(encoder: DenseEncoder, window: int, device: torch.device) -> int:
    """Return the default number of windows per batch for a window size in pixels."""
    tokens = (window // encoder.patch_size) ** 2 + encoder.prefix_tokens
    return max(1, _TOKENS.get(device.type, _TOKENS["other"]) // tokens)


def stitch(
    encoder: DenseEncoder,
    images: Sequence[torch.Tensor],
    parts: Sequence[WindowSelection],
    batch_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Encode selected windows of each image and compute the weighted sum of their features.

    Each grid cell is divided by the window count of the full plan, regardless of the selected windows. Windows are
    summed with matrix products in a fixed order, so results are reproducible on a device.

    Args:
        encoder: encoder; it runs without gradients.
        images: images (3, H, W) of any sizes, on one device.
        parts: selected windows of each image, of one window size.
        batch_size: number of windows per batch; 0 chooses it automatically.

    Returns:
        For each image, the sum (1, D, rows, columns) float32 on the patch grid of its plan, and the same sum for a
        feature of ones (1, 1, rows, columns).
    """
    device, window = images[0].device, parts[0].plan.window
    batch_size = batch_size or windows_at_once(encoder, window, device)
    positions = torch.cat([part.positions(number) for number, part in enumerate(parts)])
    if encoder.has_fixed_shape:
        batch_size = min(batch_size, -(-len(positions) // _STEP) * _STEP)
        # Pad the last batch with copies of a window; their features are ignored.
        positions = torch.cat([positions, positions[-1:].expand(-len(positions) % batch_size, -1)])
    # Copy all plans to the device at once.
    positions, *tensors = _send_all([positions, *(tensor for part in parts for tensor in part.tensors)], device)
    shares, weights = [tensors[i : i + 3] for i in range(0, len(tensors), 4)], tensors[3::4]
    positions = positions.long()
    views = _window_views(images, [part.plan for part in parts], next(encoder.parameters()).dtype)
    # (X, Y, D) for each image, so that a range of rows is a range of columns of a matrix.
    sums = [torch.zeros(*part.grid[::-1], encoder.embed_dim, device=device) for part in parts]
    for begin in range(0, len(positions), batch_size):
        image_index, top, left = positions[begin : begin + batch_size].unbind(1)
        # (b, D, y, x) -> (b, x, y, D)
        features = encoder(views[image_index, :, top, left]).float().permute(0, 3, 2, 1)
        start = 0
        for part, part_shares, total in zip(parts, shares, sums):
            first, last = max(begin - start, 0), min(begin + batch_size - start, len(part))
            if first < last:
                part.add(features[first + start - begin : last + start - begin], first, last, part_shares, total)
            start += len(part)
    # (X, Y, D) -> (1, D, Y, X)
    return [(total.permute(2, 1, 0)[None], weight[None, None]) for total, weight in zip(sums, weights)]


@dataclass(frozen=True)
class WindowSelection:
    """Selected windows of one image.

    Attributes:
        plan: window plan, at least as large as the image.
        picks: (k,) int64 window indices in the plan, on the CPU.
        factors: (k,) window weights, on the CPU.
    """

    plan: WindowPlan
    picks: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of_all(cls, plan: WindowPlan) -> WindowSelection:
        """Select all windows of a plan, with a weight of 1 each."""
        return cls(plan, torch.arange(len(plan)), torch.ones(len(plan), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.picks)

    @property
    def grid(self) -> tuple[int, int]:
        """Size of the plan in patches, (Y, X)."""
        return self.plan.height // self.plan.patch, self.plan.width // self.plan.patch

    def positions(self, number: int) -> torch.Tensor:
        """Return the image index, top and left (in pixels) of each window, (k, 3) int64."""
        return torch.nn.functional.pad(self.plan.origins[self.picks], (1, 0), value=number)

    @property
    def _lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each window among all windows of the plan, (k,) each."""
        across = len(self.plan.starts[1])
        return self.picks // across, self.picks % across

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Shares of the plan along rows and columns; row, column and factor of each window (k, 3); and the total weight
        of the windows at each patch (Y, X)."""
        rows, columns = self.plan.shares
        down, across = self._lines
        heights, widths = rows.double().sum(2)[down], columns.double().sum(2)[across]
        weight = (heights * self.factors[:, None]).T @ widths
        return [rows, columns, torch.stack([down, across, self.factors], dim=1), weight]

    def add(
        self, features: torch.Tensor, first: int, last: int, shares: Sequence[torch.Tensor], total: torch.Tensor
    ) -> None:
        """Add windows ``first`` to ``last`` to the sum of the image.

        Args:
            features: (n, x, y, D) float32 features of these windows.
            first, last: range of windows, excluding ``last``.
            shares: the first three tensors of :attr:`tensors`, on the device.
            total: sum of the image (X, Y, D), modified in place.
        """
        rows, columns, lines = shares
        down, across = lines[first:last, :2].long().unbind(1)
        # Windows are in row-major order, so a batch usually covers only a few rows of the image.
        reached = self.plan.rows_reached[self._lines[0][first:last]]
        top, bottom = int(reached[:, 0].min()), int(reached[:, 1].max())
        with full_float32(features.device):
            # (n, 1, rows, y) @ (n, x, y, D) -> (n, x, rows, D)
            share = rows[:, top:bottom][down]
            if not bool((self.factors[first:last] == 1).all()):
                share = share * lines[first:last, 2, None, None]
            lifted = (share[:, None] @ features).flatten(0, 1).flatten(1)
            # (X, n * x) @ (n * x, rows * D)
            spread = columns[across].transpose(0, 1).flatten(1)
            depth = features.shape[3]
            total.flatten(1)[:, top * depth : bottom * depth].addmm_(spread, lifted)


def _window_views(images: Sequence[torch.Tensor], plans: Sequence[WindowPlan], dtype: torch.dtype) -> torch.Tensor:
    """Return a view of the windows at all pixel positions, (B, 3, rows, columns, window, window).

    Indexing the view copies only the windows of one batch.
    """
    window = plans[0].window
    # Images of different sizes share the top left corner of a canvas.
    canvas = images[0].new_zeros(len(images), 3, max(p.height for p in plans), max(p.width for p in plans), dtype=dtype)
    for part, image in zip(canvas, images):
        part[:, : image.shape[1], : image.shape[2]] = image
    return canvas.unfold(2, window, 1).unfold(3, window, 1)


def _send_all(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy CPU tensors to a device as float32, in one asynchronous transfer."""
    # float32 represents integers below 2^24 exactly, which is sufficient for pixel positions.
    packed = send(torch.cat([tensor.flatten().float() for tensor in tensors]), device)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
