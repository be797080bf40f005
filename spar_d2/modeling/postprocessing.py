"""Converts dense features to class labels at full resolution, in row chunks.

Labels are computed without a ``classes x height x width`` tensor: scores are upsampled and reduced a chunk of rows at a
time (on a GPU, in one kernel), so that memory is bounded by the chunk size. Everything runs on the device of the
features, in float32, even under autocast or TF32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spar_d2.encoders.precision import full_float32
from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores
from spar_d2.modeling.best_query import best_allowed_query, best_query

# Smallest norm to divide by, as in torch.nn.functional.normalize.
SHORTEST = 1e-12
# Partial histograms per query, on a GPU.
_COUNTS = 256


def cosine_scores(features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Compute the cosine similarity of every patch and every query.

    Args:
        features: (D, h, w) of any norm and dtype.
        text: (Q, D) unit vectors.

    Returns:
        (h, w, Q) float32 in -1..1.

    Raises:
        ValueError: shapes do not match.
    """
    if features.ndim != 3 or text.ndim != 2 or features.shape[0] != text.shape[1]:
        raise ValueError(f"features (D, h, w) and text (Q, D) needed, got {tuple(features.shape)}, {tuple(text.shape)}")
    # (D, h, w) -> (h * w, D) without a copy. Norms are divided out last: dividing the scores is cheaper.
    with full_float32(features.device):
        patches = features.float().flatten(1).T
        lengths = patches.norm(dim=1, keepdim=True).clamp_(min=SHORTEST)
        return (patches @ text.to(patches).T).div_(lengths).unflatten(0, features.shape[1:])


@torch.no_grad()
def segment_features(
    features: torch.Tensor,
    text: torch.Tensor,
    query_class: torch.Tensor,
    size: tuple[int, int],
    padded_size: tuple[float, float] | None = None,
    logit_scale: float = 40.0,
    prob_threshold: float = 0.0,
    area_threshold: float | None = None,
) -> torch.Tensor:
    """Label every pixel with the class of its best query.

    Cosine scores are upsampled bilinearly. The probability of a class is the largest probability of its queries in a
    softmax over all queries of ``logit_scale * score``. With ``area_threshold``, a class k >= 1 is removed unless it
    covers more than that fraction of the pixels of classes >= 1. Pixels become class 0 if the probability of their best
    remaining class is below ``prob_threshold``, or if no class remains.

    Args:
        features: (D, h, w) of any norm.
        text: (Q, D) unit vectors.
        query_class: (Q,) int64, the class of each query.
        size: (H, W) of the labels.
        padded_size: height and width in pixels of the area that the feature grid covers, at least ``size``. The labels
            are its top left part. Default: ``size``.
        logit_scale: factor before the softmax; has no effect without thresholds.
        prob_threshold: 0..1.
        area_threshold: 0..1, or None to disable.

    Returns:
        (H, W) int64, on the device of ``features``.

    Raises:
        ValueError: shapes do not match, a threshold is outside 0..1, or the scale is not positive.
    """
    _check_classes(query_class, text)
    maps = [ScoreMap(cosine_scores(features, text), padded_size)]
    return segment_scores(maps, query_class, size, logit_scale, prob_threshold, area_threshold)


@torch.no_grad()
def segment_scores(
    maps: Sequence[ScoreMap],
    query_class: torch.Tensor,
    size: tuple[int, int],
    logit_scale: float = 40.0,
    prob_threshold: float = 0.0,
    area_threshold: float | None = None,
) -> torch.Tensor:
    """Same as :func:`segment_features`, from cosine scores averaged over one or more maps of an image.

    Takes one pass over the pixels, and a second one over pixels of classes that ``area_threshold`` removes. On a CUDA
    device, the host does not wait, see :func:`spar_d2.modeling.best_query.best_query`.
    """
    check_thresholds(logit_scale, prob_threshold, area_threshold)
    upsampled = UpsampledScores(maps, size)
    query_class = query_class.to(upsampled.device, torch.int64)
    with full_float32(upsampled.device):
        best, weak = best_query(upsampled, logit_scale, prob_threshold)
        if area_threshold is not None:
            areas = query_areas(best, len(query_class))
            kept = large_enough(areas, query_class, area_threshold)
            best, weak = best_allowed_query(upsampled, logit_scale, prob_threshold, kept, best, weak, areas)
            # Pixels without an allowed query keep their old one. Map those queries to class 0, which may have no query.
            query_class = query_class.masked_fill(~kept, 0)
        # Several times faster than query_class[best] on a CPU.
        labels = query_class.index_select(0, best.flatten()).view_as(best)
        return labels.masked_fill_(weak, 0) if prob_threshold > 0 else labels


def check_thresholds(logit_scale: float, prob_threshold: float, area_threshold: float | None) -> None:
    """Raise ``ValueError`` if a threshold is outside 0..1, or the scale is not positive."""
    for name, value in (("prob_threshold", prob_threshold), ("area_threshold", area_threshold or 0)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value}")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be above 0, got {logit_scale}")


def query_areas(best: torch.Tensor, queries: int) -> torch.Tensor:
    """Count the pixels (Q,) int64 of each query."""
    if best.device.type == "cpu":
        return torch.bincount(best.flatten(), minlength=queries)
    # bincount synchronizes on a GPU. Rows are distributed over several counters, because additions to the same counter
    # are serialized.
    rows = torch.arange(len(best), device=best.device) % _COUNTS
    bins = (best + queries * rows[:, None]).flatten()
    counts = torch.zeros(_COUNTS * queries, dtype=torch.int32, device=best.device)
    return counts.scatter_add_(0, bins, torch.ones_like(counts[:1]).expand_as(bins)).view(_COUNTS, -1).sum(0)


def large_enough(areas: torch.Tensor, query_class: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return (Q,) bool: queries of class 0, and of classes with a large enough share of the pixels of classes >= 1."""
    rest = query_class == 0
    areas = areas.masked_fill(rest, 0)
    # Map classes to indices below Q, however large the class numbers are: the rank of the first query of each class.
    index = torch.searchsorted(query_class.sort().values, query_class)
    of_class = torch.zeros_like(areas).scatter_add_(0, index, areas)[index]
    return (of_class > threshold * areas.sum()) | rest


@torch.no_grad()
def class_probabilities(
    features: torch.Tensor,
    text: torch.Tensor,
    query_class: torch.Tensor,
    size: tuple[int, int],
    padded_size: tuple[float, float] | None = None,
    logit_scale: float = 40.0,
    classes: int | None = None,
) -> torch.Tensor:
    """Compute the probability of every class at every pixel, as a full-resolution map.

    Takes the arguments of :func:`segment_features`, and ``classes``, the number of classes. By default, this is one
    more than the largest value in ``query_class``, which is read from the device with a synchronization.

    Returns:
        (classes, H, W) float32 in 0..1, the largest probability of each class's queries. Does not sum to one if a class
        has several queries.
    """
    _check_classes(query_class, text)
    maps = [ScoreMap(cosine_scores(features, text), padded_size)]
    return score_probabilities(maps, query_class, size, logit_scale, classes)


@torch.no_grad()
def score_probabilities(
    maps: Sequence[ScoreMap],
    query_class: torch.Tensor,
    size: tuple[int, int],
    logit_scale: float = 40.0,
    classes: int | None = None,
) -> torch.Tensor:
    """Same as :func:`class_probabilities`, from cosine scores averaged over one or more maps of an image."""
    upsampled = UpsampledScores(maps, size)
    classes = int(query_class.max()) + 1 if classes is None else classes
    query_class = query_class.to(upsampled.device)
    output = torch.zeros(classes, *size, device=upsampled.device)
    with full_float32(upsampled.device):
        for (rows, columns), band in upsampled.bands():
            probabilities = (logit_scale * band).softmax(-1)
            largest = probabilities.new_zeros(*band.shape[:2], classes)
            largest.scatter_reduce_(-1, query_class.expand_as(band), probabilities, "amax")
            output[:, rows, columns] = largest.permute(2, 0, 1)
    return output


def _check_classes(query_class: torch.Tensor, text: torch.Tensor) -> None:
    if len(query_class) != len(text) or not len(text):
        raise ValueError(f"query_class must have one class for each of the {len(text)} queries, got {len(query_class)}")
    # Skipped on a GPU, where it would synchronize.
    if query_class.device.type == "cpu" and query_class.min() < 0:
        raise ValueError(f"query_class must be class indices of 0 or more, got {query_class.min()}")
