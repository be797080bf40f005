"""Assignment of queries to segments with the least cost (Hungarian matching, as in DETR, arXiv:2005.12872)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

# Replaces costs that are NaN or infinite, so that the loss, which is then not finite either, is reported instead.
_LARGE = 1e9


class Weights(NamedTuple):
    """Weights of the class, mask (cross-entropy) and dice terms of costs and losses."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


def costs(
    probabilities: torch.Tensor,
    classes: torch.Tensor,
    masks: torch.Tensor,
    targets: torch.Tensor,
    valid: torch.Tensor,
    weights: Weights,
) -> torch.Tensor:
    """Compute the cost of each pair of query and segment.

    Args:
        probabilities: (..., Q, K) class probabilities of the queries.
        classes: (G,) class of each segment.
        masks: (..., Q, P) mask logits at points.
        targets: (G, P) whether each point is inside of each segment, 0 or 1.
        valid: (P,) weight of each point, 0 or 1.
        weights: weights of the terms.

    Returns:
        (..., Q, G): minus the probability of the class, mean cross-entropy and dice loss, weighted.
    """
    targets = targets * valid
    count = valid.sum().clamp(min=1)
    # softplus(-x) is the cross-entropy inside of a segment and softplus(x) that outside, their difference is -x.
    entropy = (F.softplus(masks) @ valid[:, None] - masks @ targets.T) / count
    inside = masks.sigmoid() * valid
    dice = 1 - (2 * inside @ targets.T + 1) / (inside.sum(-1, keepdim=True) + targets.sum(1) + 1)
    return weights.mask * entropy + weights.dice * dice - weights.classes * probabilities[..., classes]


def match(parts: Sequence[torch.Tensor]) -> list[list[tuple[list[int], list[int]]]]:
    """Assign queries to segments. A GPU is waited for once.

    Args:
        parts: costs (L, Q, G) of each image, for L independent assignments.

    Returns:
        For each image and assignment, the numbers of queries and of segments: min(Q, G) pairs.
    """
    if not parts:
        return []
    # One copy from the device for all of them.
    flat = torch.cat([part.detach().float().flatten() for part in parts]).cpu()
    flat = flat.nan_to_num(nan=_LARGE, posinf=_LARGE, neginf=-_LARGE)
    arrays = [piece.view(part.shape).numpy() for piece, part in zip(flat.split([p.numel() for p in parts]), parts)]
    return [[_pairs(cost) for cost in array] for array in arrays]


def _pairs(cost) -> tuple[list[int], list[int]]:
    queries, segments = linear_sum_assignment(cost)
    return queries.tolist(), segments.tolist()
