"""Encodes windows of several images in shared batches, and adds their features at the positions of the windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.precision import full_float32
from spar_d2.teacher.windows import WindowPlan
from spar_d2.utils.transfer import send

# Tokens per batch: enough to utilize a GPU; on a CPU, few enough to stay in its cache.
_TOKENS = {"cpu": 1 << 11, "other": 1 << 15}
# If the encoder is compiled for a fixed shape, and the batch size exceeds the number of windows, the batch size is
# reduced to the next multiple of this number.
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

    Each fine grid cell is divided by the number of windows of the full plan that cover it, whichever windows are
    selected. Matrix products add the windows in a fixed order, so results on the same device are reproducible.

    Args:
        encoder: encoder; it runs without gradients.
        images: images (3, H, W) of any sizes, on one device.
        parts: selected windows of each image; all windows have the same size.
        batch_size: number of windows per batch; 0 means :func:`windows_at_once`.

    Returns:
        For each image, the sum (1, D, Y, X) float32 on the patch grid of its plan, and the total weight (1, 1, Y, X) of
        the windows at each patch, which is the sum for features of 1.
    """
    device, window = images[0].device, parts[0].plan.window
    batch_size = batch_size or windows_at_once(encoder, window, device)
    positions = torch.cat([part.positions(number) for number, part in enumerate(parts)])
    if encoder.has_fixed_shape:
        batch_size = min(batch_size, -(-len(positions) // _STEP) * _STEP)
        # Pad the last batch with copies of a window; their features are ignored.
        positions = torch.cat([positions, positions[-1:].expand(-len(positions) % batch_size, -1)])
    # Copy the tensors of all selections to the device at once.
    positions, *tensors = _send_all([positions, *(tensor for part in parts for tensor in part.tensors)], device)
    shares, weights = [tensors[i : i + 3] for i in range(0, len(tensors), 4)], tensors[3::4]
    positions = positions.long()
    views = _window_views(images, [part.plan for part in parts], next(encoder.parameters()).dtype)
    # (X, Y, D) for each image: a range of image rows is then a range of columns in the matrix (X, Y * D).
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
        plan: window plan of the padded image.
        picks: (k,) int64 indices of the windows in the plan, on the CPU.
        factors: (k,) factors by which the features of each window are multiplied, on the CPU.
    """

    plan: WindowPlan
    picks: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of_all(cls, plan: WindowPlan) -> WindowSelection:
        """Select all windows of a plan, each with a factor of 1."""
        return cls(plan, torch.arange(len(plan)), torch.ones(len(plan), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.picks)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches along each side of the padded image, (Y, X)."""
        return self.plan.height // self.plan.patch, self.plan.width // self.plan.patch

    def positions(self, number: int) -> torch.Tensor:
        """Return the image index ``number``, and the top and left in pixels, of each window, (k, 3) int64."""
        return torch.nn.functional.pad(self.plan.origins[self.picks], (1, 0), value=number)

    @property
    def _lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each selected window in the plan's array of windows, (k,) each."""
        across = len(self.plan.starts[1])
        return self.picks // across, self.picks % across

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Four tensors: the row and column matrices of :attr:`WindowPlan.shares`; the row, column and factor of each
        window, (k, 3); and the total weight of the windows at each patch, (Y, X)."""
        rows, columns = self.plan.shares
        down, across = self._lines
        heights, widths = rows.double().sum(2)[down], columns.double().sum(2)[across]
        weight = (heights * self.factors[:, None]).T @ widths
        return [rows, columns, torch.stack([down, across, self.factors], dim=1), weight]

    def add(
        self, features: torch.Tensor, first: int, last: int, shares: Sequence[torch.Tensor], total: torch.Tensor
    ) -> None:
        """Add the features of a range of windows to the sum of their image.

        Args:
            features: (n, x, y, D) float32 features of these windows.
            first, last: range of the selected windows, excluding ``last``.
            shares: the first three tensors of :attr:`tensors`, on the device.
            total: (X, Y, D) sum of the image, modified in place.
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
    """Return a view with a window at every pixel position, (B, 3, tops, lefts, window, window).

    Indexing the view copies only the chosen windows.
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
