"""Feature maps as colors, by their three main directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def shared_pca_colors(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Project feature maps on their first three principal components, one projection for all, and show them as RGB.

    Equal colors mean equal features, across maps too.

    Args:
        maps: each (D, h, w), any h and w; D is the same for all.

    Returns:
        For each map (h, w, 3) float32 in 0..1, on the CPU.

    Raises:
        ValueError: no maps, or fewer than three channels.
    """
    colors = fit_pca_colors(maps)
    return [colors(m) for m in maps]


def fit_pca_colors(maps: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The coloring of :func:`shared_pca_colors`, as a function that other maps can be given to as well.

    Arguments and errors are the same; what is beyond the range of ``maps`` gets the color at its end.
    """
    if not maps or any(m.ndim != 3 or m.shape[0] < 3 for m in maps):
        raise ValueError(f"maps must be (D, h, w) with D >= 3, got {[tuple(m.shape) for m in maps]}")
    # (D, h, w) -> (h * w, D), all maps in one table.
    table = torch.cat([_rows(m) for m in maps])
    mean = table.mean(0)
    centerd = table - mean
    # Eigenvectors of the covariance, the largest last; the sign of each is arbitrary, so it is fixed.
    directions = torch.linalg.eigh(centerd.T @ centerd).eigenvectors[:, -3:].flip(1)
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, torch.arange(3)].sign()
    colors = centerd @ directions
    # Nearly all of the range: single outliers must not make everything else gray.
    low, high = colors.quantile(0.01, dim=0), colors.quantile(0.99, dim=0)

    def color(features: torch.Tensor) -> torch.Tensor:
        projected = (_rows(features) - mean) @ directions
        colors = ((projected - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        return colors.reshape(*features.shape[1:], 3)

    return color


def _rows(features: torch.Tensor) -> torch.Tensor:
    return features.detach().float().cpu().flatten(1).T
