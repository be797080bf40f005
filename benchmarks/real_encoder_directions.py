"""Unexplained variance of features along the principal directions of a target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Ranges of principal directions, sorted by variance.
RANGES = ((0, 4), (4, 16), (16, 64), (64, 128), (128, None))


def principal_directions(targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the principal directions (D, D) of feature maps (D, h, w), one in each column, largest variance first."""
    columns = torch.cat([target.flatten(1) for target in targets], dim=1)
    centered = columns - columns.mean(1, keepdim=True)
    return torch.linalg.eigh(centered @ centered.T / centered.shape[1]).eigenvectors.flip(1)


def unexplained(
    targets: Sequence[torch.Tensor], features: Sequence[torch.Tensor], directions: torch.Tensor
) -> list[tuple[float, float]]:
    """Compare features with their targets in the ranges of directions, and in all.

    Returns:
        For each range, and at the end for all directions: the share of the variance of the targets within an image, and
        the squared error of the features; both in percent, the second of the variance in the range.
    """
    variance = error = torch.zeros(len(directions))
    for target, feature in zip(targets, features):
        projected = directions.T @ target.flatten(1)
        variance = variance + (projected - projected.mean(1, keepdim=True)).square().mean(1)
        error = error + (projected - directions.T @ feature.flatten(1)).square().mean(1)
    parts = [slice(*bounds) for bounds in (*RANGES, (0, None))]
    return [
        (float(100 * variance[part].sum() / variance.sum()), float(100 * error[part].sum() / variance[part].sum()))
        for part in parts
    ]
