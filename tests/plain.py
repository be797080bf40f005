"""Slow implementations that follow the definitions word by word, to compare the fast ones with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def segmentation(
    features: torch.Tensor,
    text: torch.Tensor,
    query_class: torch.Tensor,
    size: tuple[int, int],
    padded_size: tuple[int, int],
    logit_scale: float,
    prob_threshold: float,
    area_threshold: float | None,
) -> torch.Tensor:
    """``segment_features`` with full maps, one operation after the other."""
    low = torch.einsum("dhw,qd->qhw", F.normalize(features, dim=0), text)
    full = F.interpolate(low[None], size=padded_size, mode="bilinear", align_corners=False)[0]
    scores = full[:, : size[0], : size[1]]
    return labels_of_scores(scores, query_class, logit_scale, prob_threshold, area_threshold)


def labels_of_scores(
    scores: torch.Tensor,
    query_class: torch.Tensor,
    logit_scale: float,
    prob_threshold: float,
    area_threshold: float | None,
) -> torch.Tensor:
    """The labels of ``segment_features`` from the scores (Q, H, W) of all pixels."""
    probabilities = (logit_scale * scores).softmax(0)
    classes = int(query_class.max()) + 1
    # A class without a query has no probability.
    best = scores.new_zeros(classes, *scores.shape[1:])
    for k in query_class.unique():
        best[k] = probabilities[query_class == k].amax(0)
    if area_threshold is not None:
        areas = torch.bincount(best.argmax(0).flatten(), minlength=classes)
        areas[0] = 0
        keep = areas > area_threshold * areas.sum()
        keep[0] = True
        best = best * keep[:, None, None]
    labels = best.argmax(0)
    labels[best.amax(0) < prob_threshold] = 0
    return labels


def panoptic_counts(
    prediction: np.ndarray,
    predicted: dict[int, int],
    truth: np.ndarray,
    segments: list[tuple],
    categories: Sequence[int],
) -> dict[int, list]:
    """The rules pixel by pixel and segment by segment: {category: [IoUs, TP, FP, FN]}."""
    shared, true_area, found_area = defaultdict(int), defaultdict(int), defaultdict(int)
    for guess, true in zip(prediction.ravel().tolist(), truth.ravel().tolist()):
        shared[true, guess] += 1
        true_area[true] += 1
        found_area[guess] += 1
    counts = {category: [0.0, 0, 0, 0] for category in categories}
    paired_truths, paired_guesses = set(), set()
    for true, category, crowd in segments:
        for guess, guessed in predicted.items():
            if crowd or category != guessed or not shared[true, guess]:
                continue
            union = true_area[true] + found_area[guess] - shared[true, guess] - shared[0, guess]
            if 2 * shared[true, guess] > union:
                counts[category][0] += shared[true, guess] / union
                counts[category][1] += 1
                paired_truths.add(true)
                paired_guesses.add(guess)
    last_crowd = {}
    for true, category, crowd in segments:
        if crowd:
            last_crowd[category] = true
        elif true not in paired_truths:
            counts[category][3] += 1
    for guess, category in predicted.items():
        if guess not in paired_guesses:
            forgiven = shared[0, guess] + (shared[last_crowd[category], guess] if category in last_crowd else 0)
            if 2 * forgiven <= found_area[guess]:
                counts[category][2] += 1
    return counts


def patch_propagation(scores: torch.Tensor, guide: torch.Tensor, patch: float, neighbors: int) -> torch.Tensor:
    """``lposs`` with dense float64 matrices."""
    height, width, _ = scores.shape
    features = guide.double().flatten(1).T
    features = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).double()
    similarity = features @ features.T
    weights = similarity.clamp(min=0) ** 3 * torch.exp(-0.01 * patch * torch.cdist(cells, cells))
    nearest = similarity.argsort(1, descending=True)[:, :neighbors]
    weights = weights * torch.zeros_like(weights).scatter_(1, nearest, 1)
    return _ten_steps(weights + weights.T, scores.double().flatten(0, 1)).view(scores.shape)


def pixel_propagation(scores: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """``lposs_plus`` with dense float64 matrices."""
    _, height, width = image.shape
    rgb = image.double().flatten(1)
    rgb = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    xyz = torch.tensor(to_xyz, dtype=torch.float64) @ rgb / torch.tensor([[0.95047], [1.0], [1.08883]])
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 4 / 29)
    lab = torch.stack([(116 * y - 16) / 100, 500 * (x - y) / 128, 200 * (y - z) / 128], dim=1)
    rows, columns = torch.arange(height * width) // width, torch.arange(height * width) % width
    close = ((rows[:, None] - rows).abs() <= 6) & ((columns[:, None] - columns).abs() <= 6)
    distance = (lab[:, None] - lab).norm(dim=2)
    return _ten_steps(torch.exp(-distance / 0.01) * close, scores.double().flatten(1).T).T.reshape(scores.shape)


def _ten_steps(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Conjugate gradients on the normalized graph (N, N), one column of (N, Q) after the other."""
    weights = weights.clone().fill_diagonal_(0)
    degree = weights.sum(1)
    degree[degree == 0] = 1
    matrix = torch.eye(len(weights)) - 0.95 * weights / (degree[:, None] * degree).sqrt()
    solutions = []
    for y in targets.T:
        z, r, p = torch.zeros_like(y), y, y
        for _ in range(10):
            if r.norm() <= 1e-6 * y.norm():
                break
            q = matrix @ p
            step = r.dot(r) / p.dot(q)
            z, rest = z + step * p, r - step * q
            r, p = rest, rest + rest.dot(rest) / r.dot(r) * p
        solutions.append(z)
    return torch.stack(solutions, dim=1)
