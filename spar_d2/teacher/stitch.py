"""Windows of images encoded together, whatever image they are of, and their features added up where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spar_d2.encoders import DenseEncoder
from spar_d2.encoders.precision import full_float32
from spar_d2.teacher.windows import WindowPlan
from spar_d2.utils.transfer import send

# Tokens of the windows that are encoded at once: what keeps a GPU busy, or stays in a processor's cache.
_TOKENS = {"cpu": 1 << 11, "other": 1 << 15}
# Batches of one shape have a multiple of so many windows.
_STEP = 16


def windows_at_once(encoder: DenseEncoder, window: int, device: torch.device) -> int:
    """How many windows, of a side in pixels, are encoded at once on a device where nothing else is asked for."""
    tokens = (window // encoder.patch_size) ** 2 + encoder.prefix_tokens
    return max(1, _TOKENS.get(device.type, _TOKENS["other"]) // tokens)


def stitch(
    encoder: DenseEncoder,
    images: Sequence[torch.Tensor],
    plans: Sequence[WindowPlan],
    picks: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    batch_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Encode chosen windows of each image and add them up, each as often as its factor says.

    Every cell is divided by the count of the FULL plan, whatever the windows chosen. Windows are added by matrix
    products, in a fixed order, so that every run on a device gives the same bits.

    Args:
        encoder: used as it is; without gradients.
        images: (3, H, W) each, of any sizes, on one device.
        plans: of each image; at least as large as the image.
        picks: (k,) int64 on the CPU for each image, numbers of windows in its plan.
        factors: (k,) on the CPU for each image, how often each window counts.
        batch_size: windows encoded at once; 0 chooses by their tokens.

    Returns:
        For each image the sum (1, D, rows, columns) at the patches of its plan, float32, and the same for ones instead
        of features (1, 1, rows, columns).
    """
    device, window = images[0].device, plans[0].window
    batch_size = batch_size or windows_at_once(encoder, window, device)
    parts = [_Part(*part) for part in zip(plans, picks, factors)]
    places = torch.cat([part.places(number) for number, part in enumerate(parts)])
    if encoder.has_fixed_shape:
        batch_size = min(batch_size, -(-len(places) // _STEP) * _STEP)
        # Their features are not looked at.
        places = torch.cat([places, places[-1:].expand(-len(places) % batch_size, -1)])
    # Everything about the plans goes to the device at once.
    places, *tensors = _send_all([places, *(tensor for part in parts for tensor in part.tensors)], device)
    shares, weights = [tensors[i : i + 3] for i in range(0, len(tensors), 4)], tensors[3::4]
    places = places.long()
    views = _window_views(images, plans, next(encoder.parameters()).dtype)
    # (X, Y, D) for each image, so that a range of rows is a range of columns of a matrix.
    sums = [torch.zeros(*part.grid[::-1], encoder.embed_dim, device=device) for part in parts]
    for begin in range(0, len(places), batch_size):
        owner, top, left = places[begin : begin + batch_size].unbind(1)
        # (b, D, y, x) -> (b, x, y, D)
        features = encoder(views[owner, :, top, left]).float().permute(0, 3, 2, 1)
        start = 0
        for part, own, total in zip(parts, shares, sums):
            first, last = max(begin - start, 0), min(begin + batch_size - start, len(part))
            if first < last:
                part.add(features[first + start - begin : last + start - begin], first, last, own, total)
            start += len(part)
    # (X, Y, D) -> (1, D, Y, X)
    return [(total.permute(2, 1, 0)[None], weight[None, None]) for total, weight in zip(sums, weights)]


@dataclass(frozen=True)
class _Part:
    """Windows of one image."""

    plan: WindowPlan
    picks: torch.Tensor
    factors: torch.Tensor

    def __len__(self) -> int:
        return len(self.picks)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of the plan, (Y, X)."""
        return self.plan.height // self.plan.patch, self.plan.width // self.plan.patch

    def places(self, number: int) -> torch.Tensor:
        """(k, 3) int64: number of the image, top and left in pixels."""
        return torch.nn.functional.pad(self.plan.origins[self.picks], (1, 0), value=number)

    @property
    def _lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which row and which column of windows each window is in, (k,) each."""
        across = len(self.plan.starts[1])
        return self.picks // across, self.picks % across

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The plan's shares along rows and columns, (k, 3) row, column and factor of each window, and the weight of the
        windows at every patch (Y, X)."""
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
            features: (n, x, y, D) float32, of these windows.
            shares: the first three of :attr:`tensors`, on the device.
            total: (X, Y, D), changed in place.
        """
        rows, columns, lines = shares
        down, across = lines[first:last, :2].long().unbind(1)
        # Windows follow each other row by row: those of a batch mostly lie in a few rows of the image.
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
    """All windows at all places, (B, 3, rows, columns, window, window): indexing it copies those of one batch only."""
    window = plans[0].window
    # All images at one corner of a common canvas.
    canvas = images[0].new_zeros(len(images), 3, max(p.height for p in plans), max(p.width for p in plans), dtype=dtype)
    for part, image in zip(canvas, images):
        part[:, : image.shape[1], : image.shape[2]] = image
    return canvas.unfold(2, window, 1).unfold(3, window, 1)


def _send_all(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """CPU tensors as float32 on a device, by one copy that the CPU does not wait for."""
    # Whole numbers below 16 million, as all pixels' places are, stay what they are.
    packed = send(torch.cat([tensor.flatten().float() for tensor in tensors]), device)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
