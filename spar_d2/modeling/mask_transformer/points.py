"""Points at which masks are compared, instead of all pixels (PointRend, arXiv:1912.08193)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Candidates for each point, and share of the points that are chosen among them by uncertainty.
_OVERSAMPLING, _UNCERTAIN = 3, 0.75


def sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Sample maps bilinearly.

    Args:
        maps: (N, C, h, w).
        points: (N, P, 2), x and y in 0..1 of the maps.

    Returns:
        (N, C, P).
    """
    return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False, padding_mode="border")[:, :, 0]


def placed(points: torch.Tensor, scale: tuple[float, float]) -> torch.Tensor:
    """Convert points (..., 2) in an image to points in the larger area that its patches cover.

    Args:
        points: x and y in 0..1 of the image.
        scale: width and height of the image relative to the area.
    """
    x, y = points.unbind(-1)
    return torch.stack([x * scale[0], y * scale[1]], dim=-1)


def look_up(labels: torch.Tensor, points: torch.Tensor, number: torch.Tensor | None = None) -> torch.Tensor:
    """Return labels of the pixels at points.

    Args:
        labels: (..., H, W), or (N, H, W) with ``number``.
        points: (P, 2), or (M, P, 2) with ``number``; x and y in 0..1.
        number: (M,) number of the map in which each set of points is looked up.

    Returns:
        (..., P), or (M, P) with ``number``.
    """
    height, width = labels.shape[-2:]
    x = (points[..., 0] * width).long().clamp_(max=width - 1)
    y = (points[..., 1] * height).long().clamp_(max=height - 1)
    return labels[..., y, x] if number is None else labels[number[:, None], y, x]


@torch.no_grad()
def uncertain_points(masks: torch.Tensor, count: int, scale: tuple[float, float]) -> torch.Tensor:
    """Choose points where mask logits are close to 0, and others at random.

    Args:
        masks: (N, h, w) logits.
        count: number of points P of each mask.
        scale: see :func:`placed`.

    Returns:
        (N, P, 2), x and y in 0..1 of the image.
    """
    candidates = torch.rand(len(masks), _OVERSAMPLING * count, 2, device=masks.device)
    chosen = int(_UNCERTAIN * count)
    distance = sample(masks[:, None], placed(candidates, scale))[:, 0].abs()
    nearest = distance.topk(chosen, dim=1, largest=False, sorted=False).indices
    certain = torch.rand(len(masks), count - chosen, 2, device=masks.device)
    return torch.cat([candidates.gather(1, nearest[..., None].expand(-1, -1, 2)), certain], dim=1)
