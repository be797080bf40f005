"""Visualizes feature maps by their first three principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def shared_pca_colors(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Map features to RGB colors by their first three principal components, with a joint projection of all maps.

    Equal colors mean equal features, also across maps.

    Args:
        maps: feature maps (D, h, w) of any size, with the same D.

    Returns:
        Colors (h, w, 3) float32 in 0..1 of each map, on the CPU.

    Raises:
        ValueError: there are no maps, or fewer than three channels.
    """
    colors = fit_pca_colors(maps)
    return [colors(m) for m in maps]


def fit_pca_colors(maps: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the mapping of :func:`shared_pca_colors` as a function, which can be applied to other maps.

    Arguments and exceptions are the same. Colors are clipped to the range of ``maps``.
    """
    if not maps or any(m.ndim != 3 or m.shape[0] < 3 for m in maps):
        raise ValueError(f"maps must be (D, h, w) with D >= 3, got {[tuple(m.shape) for m in maps]}")
    # (D, h, w) -> (h * w, D), all maps in one matrix.
    table = torch.cat([_rows(m) for m in maps])
    mean = table.mean(0)
    centered = table - mean
    # Eigenvectors are sorted in ascending order, and their signs are arbitrary, so they are normalized.
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -3:].flip(1)
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, torch.arange(3)].sign()
    colors = centered @ directions
    # Quantiles instead of the full range: a single outlier would reduce the contrast of everything else.
    low, high = colors.quantile(0.01, dim=0), colors.quantile(0.99, dim=0)

    def color(features: torch.Tensor) -> torch.Tensor:
        projected = (_rows(features) - mean) @ directions
        colors = ((projected - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        return colors.reshape(*features.shape[1:], 3)

    return color


def _rows(features: torch.Tensor) -> torch.Tensor:
    return features.detach().float().cpu().flatten(1).T
