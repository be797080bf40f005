"""From dense features to class labels at full resolution, in row bands.

No ``classes x height x width`` tensor is made on the way to labels: scores are upsampled and reduced a band of rows at
a time, so that memory grows with the band alone. Plain PyTorch, on the device of the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spar_d2.modeling.bands import ScoreMap, UpsampledScores

# As torch.nn.functional.normalize: what a vector of zeros is divided by.
_SHORTEST = 1e-12
# Share of pixels up to which taking them one by one is faster than all in bands.
_FEW = 0.1


def cosine_scores(features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosines of every patch with every query.

    Args:
        features: (D, h, w), any length.
        text: (Q, D), unit vectors.

    Returns:
        (h, w, Q) float32 in -1..1.

    Raises:
        ValueError: shapes that do not go together.
    """
    if features.ndim != 3 or text.ndim != 2 or features.shape[0] != text.shape[1]:
        raise ValueError(f"features (D, h, w) and text (Q, D) needed, got {tuple(features.shape)}, {tuple(text.shape)}")
    # (D, h, w) -> (h * w, D), without a copy; lengths are divided by last, for they are few.
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
    ``prob_threshold`` become class 0.

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

    One pass over the pixels; those of classes that ``area_threshold`` removes are looked at a second time.
    """
    for name, value in (("prob_threshold", prob_threshold), ("area_threshold", area_threshold or 0)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value}")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be above 0, got {logit_scale}")
    query_class = query_class.to(maps[0].scores.device)
    upsampled = UpsampledScores(maps, size)
    labels = torch.empty(size, dtype=torch.int64, device=query_class.device)
    weak = torch.zeros(size, dtype=torch.bool, device=query_class.device) if prob_threshold > 0 else None

    def label(place: tuple, scores: torch.Tensor, allowed: torch.Tensor | None = None) -> None:
        highest, best = scores.max(-1)
        top = highest
        if allowed is not None:
            top, best = scores.masked_fill(~allowed, -torch.inf).max(-1)
        labels[place] = query_class[best]
        if weak is not None:
            # The softmax runs over all queries, also those that cannot win.
            total = torch.sub(scores, highest[..., None]).mul_(logit_scale).exp_().sum(-1)
            weak[place] = ((top - highest) * logit_scale).exp() / total < prob_threshold

    for place, scores in upsampled.bands():
        label(place, scores)
    if area_threshold is not None:
        areas = torch.bincount(labels.flatten(), minlength=int(query_class.max()) + 1)
        areas[0] = 0
        kept = areas > area_threshold * areas.sum()
        kept[0] = True
        if not bool(kept[areas > 0].all()):
            removed = ~kept[labels]
            few = removed.float().mean() < _FEW
            for place, scores in upsampled.pixels(removed) if few else upsampled.bands():
                label(place, scores, kept[query_class])
    return labels if weak is None else labels.masked_fill_(weak, 0)


@torch.no_grad()
def class_probabilities(
    features: torch.Tensor,
    text: torch.Tensor,
    query_class: torch.Tensor,
    size: tuple[int, int],
    padded_size: tuple[float, float] | None = None,
    logit_scale: float = 40.0,
) -> torch.Tensor:
    """Probability of every class at every pixel: the whole map, for those who need it.

    Arguments as for :func:`segment_features`.

    Returns:
        (classes, H, W) float32 in 0..1, the largest probability among each class's queries; does not sum to one where
        a class has synonyms.
    """
    _check_classes(query_class, text)
    maps = [ScoreMap(cosine_scores(features, text), padded_size)]
    return score_probabilities(maps, query_class, size, logit_scale)


@torch.no_grad()
def score_probabilities(
    maps: Sequence[ScoreMap], query_class: torch.Tensor, size: tuple[int, int], logit_scale: float = 40.0
) -> torch.Tensor:
    """As :func:`class_probabilities`, from cosine scores averaged over one or more maps of an image."""
    upsampled = UpsampledScores(maps, size)
    query_class = query_class.to(maps[0].scores.device)
    classes = int(query_class.max()) + 1
    output = maps[0].scores.new_zeros(classes, *size)
    for (rows, columns), band in upsampled.bands():
        probabilities = (logit_scale * band).softmax(-1)
        largest = probabilities.new_zeros(*band.shape[:2], classes)
        largest.scatter_reduce_(-1, query_class.expand_as(band), probabilities, "amax")
        output[:, rows, columns] = largest.permute(2, 0, 1)
    return output


def _check_classes(query_class: torch.Tensor, text: torch.Tensor) -> None:
    if len(query_class) != len(text):
        raise ValueError(f"query_class must name the class of each of the {len(text)} queries, got {len(query_class)}")
