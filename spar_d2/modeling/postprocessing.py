"""From dense features to class labels at full resolution, in row bands.

No ``classes x height x width`` tensor is made on the way to labels: scores are upsampled and reduced a band of rows at
a time, so that memory grows with the band alone, or on a GPU in one kernel. On the device of the features, and always
in float32, also where autocast or TF32 surrounds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spar_d2.encoders.precision import full_float32
from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores
from spar_d2.modeling.best_query import best_allowed_query, best_query

# As torch.nn.functional.normalize: what a vector of zeros is divided by.
_SHORTEST = 1e-12
# Of each query's pixels, on a GPU.
_COUNTS = 256


def cosine_scores(features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosines of every patch with every query.

    Args:
        features: (D, h, w), any length, any type.
        text: (Q, D), unit vectors.

    Returns:
        (h, w, Q) float32 in -1..1.

    Raises:
        ValueError: shapes that do not go together.
    """
    if features.ndim != 3 or text.ndim != 2 or features.shape[0] != text.shape[1]:
        raise ValueError(f"features (D, h, w) and text (Q, D) needed, got {tuple(features.shape)}, {tuple(text.shape)}")
    # (D, h, w) -> (h * w, D), without a copy; lengths are divided by last, for they are few.
    with full_float32(features.device):
        patches = features.float().flatten(1).T
        lengths = patches.norm(dim=1, keepdim=True).clamp_(min=_SHORTEST)
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

    Cosine scores are upsampled bilinearly; the probability of a class is the largest of its queries' in a softmax over
    all queries of ``logit_scale * score``. With ``area_threshold``, a class k >= 1 is removed unless it covers more
    than that share of the pixels that classes >= 1 cover. Pixels whose best remaining class is less probable than
    ``prob_threshold``, or which have none, become class 0.

    Args:
        features: (D, h, w), of any length.
        text: (Q, D), unit vectors.
        query_class: (Q,) int64, the class of each query.
        size: (H, W) of the labels.
        padded_size: pixels that the feature grid covers, at least ``size``; the labels are cropped from the top left.
            Default: ``size``.
        logit_scale: factor before the softmax; without thresholds it has no effect.
        prob_threshold: 0..1.
        area_threshold: 0..1, or None for none.

    Returns:
        (H, W) int64, on the device of ``features``.

    Raises:
        ValueError: shapes that do not go together, a threshold outside 0..1, or a scale that is not positive.
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
    """As :func:`segment_features`, from cosine scores averaged over one or more maps of an image.

    One pass over the pixels; those of classes that ``area_threshold`` removes are looked at a second time. On a CUDA
    device the host does not wait, see :func:`spar_d2.modeling.best_query.best_query`.
    """
    for name, value in (("prob_threshold", prob_threshold), ("area_threshold", area_threshold or 0)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value}")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be above 0, got {logit_scale}")
    upsampled = UpsampledScores(maps, size)
    query_class = query_class.to(upsampled.device, torch.int64)
    with full_float32(upsampled.device):
        best, weak = best_query(upsampled, logit_scale, prob_threshold)
        if area_threshold is not None:
            areas = _areas(best, len(query_class))
            kept = _large_enough(areas, query_class, area_threshold)
            best, weak = best_allowed_query(upsampled, logit_scale, prob_threshold, kept, best, weak, areas)
            # Queries that are not allowed are left where none is, as class 0 may have no query.
            query_class = query_class.masked_fill(~kept, 0)
        # Several times as fast on a CPU as query_class[best].
        labels = query_class.index_select(0, best.flatten()).view_as(best)
        return labels.masked_fill_(weak, 0) if prob_threshold > 0 else labels


def _areas(best: torch.Tensor, queries: int) -> torch.Tensor:
    """Pixels of each query, (Q,) int64, from the queries of all pixels."""
    if best.device.type == "cpu":
        return torch.bincount(best.flatten(), minlength=queries)
    # Elsewhere bincount waits for the device. Rows are added to different counts, for pixels that are added to the same
    # one wait for each other.
    rows = torch.arange(len(best), device=best.device) % _COUNTS
    places = (best + queries * rows[:, None]).flatten()
    counts = torch.zeros(_COUNTS * queries, dtype=torch.int32, device=best.device)
    return counts.scatter_add_(0, places, torch.ones_like(counts[:1]).expand_as(places)).view(_COUNTS, -1).sum(0)


def _large_enough(areas: torch.Tensor, query_class: torch.Tensor, threshold: float) -> torch.Tensor:
    """(Q,) bool: queries of class 0, and of classes with more than a share of the pixels of classes >= 1."""
    rest = query_class == 0
    areas = areas.masked_fill(rest, 0)
    # Numbers of classes below Q, however large their names are: the place of the first of its queries in their order.
    number = torch.searchsorted(query_class.sort().values, query_class)
    of_class = torch.zeros_like(areas).scatter_add_(0, number, areas)[number]
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
    """Probability of every class at every pixel: the whole map, for those who need it.

    Arguments as for :func:`segment_features`, and ``classes``, the number of classes. Its default, one more than the
    largest in ``query_class``, is read from the device, for which the host waits.

    Returns:
        (classes, H, W) float32 in 0..1, the largest probability among each class's queries; does not sum to one where
        a class has synonyms.
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
    """As :func:`class_probabilities`, from cosine scores averaged over one or more maps of an image."""
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
        raise ValueError(f"query_class must name the class of each of the {len(text)} queries, got {len(query_class)}")
    # On a GPU the host would wait for it.
    if query_class.device.type == "cpu" and query_class.min() < 0:
        raise ValueError(f"query_class must be numbers of classes, 0 or more, got {query_class.min()}")
