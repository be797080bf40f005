"""Windows of images encoded together, whatever image they are of, and their features added up where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from spar_d2.encoders import DenseEncoder
from spar_d2.teacher.windows import WindowPlan


def stitch(
    encoder: DenseEncoder,
    images: Sequence[torch.Tensor],
    plans: Sequence[WindowPlan],
    picks: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    batch_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Encode chosen windows of each image and add them up, each as often as its factor says.

    Every cell is divided by the count of the FULL plan, whatever the windows chosen.

    Args:
        encoder: used as it is.
        images: (3, H, W) each, of any sizes, on one device.
        plans: of each image; at least as large as the image.
        picks: (k,) int64 for each image, numbers of windows in its plan.
        factors: (k,) for each image, how often each window counts.
        batch_size: windows encoded at once.

    Returns:
        For each image the sum (1, D, rows, columns) at the patches of its plan, float32, and the same for ones instead
        of features (1, 1, rows, columns).
    """
    device = images[0].device
    window, cells = plans[0].window, plans[0].window_cells
    # All images at one corner of a common canvas; a view (B, 3, rows, columns, window, window) of it: indexing that
    # copies the windows of one batch only.
    canvas = images[0].new_zeros(len(images), 3, max(p.height for p in plans), max(p.width for p in plans))
    for part, image in zip(canvas, images):
        part[:, : image.shape[1], : image.shape[2]] = image
    views = canvas.unfold(2, window, 1).unfold(3, window, 1)

    owner = torch.cat([torch.full((len(own),), number) for number, own in enumerate(picks)])
    windows, weights = torch.cat(list(picks)), torch.cat(list(factors)).to(device, torch.float32)
    sizes = [plan.counts.numel() for plan in plans]
    offsets = [sum(sizes[:number]) for number in range(len(plans))]
    mosaic = torch.zeros(sum(sizes), encoder.embed_dim, device=device)
    seen = torch.zeros(sum(sizes), device=device)
    for start in range(0, len(windows), batch_size):
        batch = slice(start, start + batch_size)
        parts = [(number, windows[batch][owner[batch] == number]) for number in owner[batch].unique().tolist()]
        tops, lefts = torch.cat([plans[number].origins[own] for number, own in parts]).unbind(1)
        features = encoder(views[owner[batch], :, tops, lefts]).float()
        if plans[0].factor > 1:
            features = F.interpolate(features, size=(cells, cells), mode="bilinear", align_corners=False)
        places = torch.cat([plans[number].cells_of(own) + offsets[number] for number, own in parts]).flatten()
        places, weight = places.to(device), weights[batch]
        # (b, D, c, c) -> (b * c * c, D), the order of `places`.
        features = (features * weight[:, None, None, None]).permute(0, 2, 3, 1).reshape(len(places), -1)
        mosaic.index_add_(0, places, features)
        seen.index_add_(0, places, weight[:, None].expand(-1, cells**2).reshape(-1))
    parts = zip(mosaic.split(sizes), seen[:, None].split(sizes), plans)
    return [(_to_patches(sums, plan), _to_patches(ones, plan)) for sums, ones, plan in parts]


def _to_patches(mosaic: torch.Tensor, plan: WindowPlan) -> torch.Tensor:
    """Sums (cells, C) to their share of the full plan's mean, at the patches: (1, C, rows, columns)."""
    counts = plan.counts.to(mosaic.device).flatten()
    mosaic = mosaic.div_(counts[:, None]).reshape(1, *plan.mosaic_size, -1).permute(0, 3, 1, 2)
    patches = (plan.height // plan.patch, plan.width // plan.patch)
    if patches != plan.mosaic_size:
        mosaic = F.interpolate(mosaic, size=patches, mode="bilinear", align_corners=False)
    return mosaic
