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
    probabilities = (logit_scale * full[:, : size[0], : size[1]]).softmax(0)
    classes = int(query_class.max()) + 1
    # A class without a query has no probability.
    best = features.new_zeros(classes, *size)
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
