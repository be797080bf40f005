"""From dense features to class labels at full resolution, in row bands.

No ``classes x height x width`` tensor is made on the way to labels: scores are upsampled and reduced a band of rows at
a time, so that memory grows with the band alone. Plain PyTorch, on the device of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Bytes of one band of upsampled scores: what a CPU's cache holds, or enough work for a GPU.
_BAND_BYTES = {"cpu": 2 << 20, "other": 64 << 20}


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
    patches = F.normalize(features.float(), dim=0).permute(1, 2, 0)
    return patches @ text.to(patches).T


@dataclass(frozen=True)
class _Resampling:
    """Bilinear resampling along one side (align_corners=False): each place lies between two source places."""

    before: torch.Tensor
    after: torch.Tensor
    fraction: torch.Tensor

    @classmethod
    def along(cls, source: int, covered: float, wanted: int, device: torch.device) -> _Resampling:
        """``source`` cells cover ``covered`` pixels, of which the first ``wanted`` are asked for."""
        places = torch.arange(wanted, device=device, dtype=torch.float32)
        position = ((places + 0.5) * (source / covered) - 0.5).clamp(0, source - 1)
        before = position.long()
        return cls(before, (before + 1).clamp(max=source - 1), position - before)


def upsampled_bands(
    scores: torch.Tensor, size: tuple[int, int], padded_size: tuple[float, float] | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Scores upsampled bilinearly, a band of rows at a time.

    Args:
        scores: (h, w, Q), covering ``padded_size``.
        size: (H, W), the pixels wanted, counted from the top left.
        padded_size: pixels that the grid covers, at least ``size``; may be fractional; default ``size``.

    Returns:
        Iterator over rows of the output and their scores (rows, W, Q).

    Raises:
        ValueError: a size that is not positive, or ``padded_size`` smaller than ``size``.
    """
    height, width = size
    padded_size = padded_size or size
    # Checked here and not in the iterator, so that it is done before the first band is asked for.
    if min(size) < 1:
        raise ValueError(f"size must be at least 1x1, got {height}x{width}")
    if padded_size[0] < height or padded_size[1] < width:
        raise ValueError(f"padded_size must be at least size {height}x{width}, got {tuple(padded_size)}")
    down = _Resampling.along(scores.shape[0], padded_size[0], height, scores.device)
    across = _Resampling.along(scores.shape[1], padded_size[1], width, scores.device)
    budget = _BAND_BYTES.get(scores.device.type, _BAND_BYTES["other"])
    rows_at_once = max(1, budget // (width * scores.shape[2] * scores.element_size()))
    return _bands(scores, down, across, rows_at_once)


def _bands(
    scores: torch.Tensor, down: _Resampling, across: _Resampling, rows_at_once: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    height = len(down.before)
    for start in range(0, height, rows_at_once):
        rows = slice(start, min(start + rows_at_once, height))
        # (rows, w, Q), then (rows, W, Q): queries last, so that every step moves whole runs of memory.
        band = torch.lerp(scores[down.before[rows]], scores[down.after[rows]], down.fraction[rows, None, None])
        yield rows, torch.lerp(band[:, across.before], band[:, across.after], across.fraction[:, None])


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
        ValueError: shapes that do not go together.
    """
    if len(query_class) != len(text):
        raise ValueError(f"query_class must name the class of each of the {len(text)} queries, got {len(query_class)}")
    scores = cosine_scores(features, text)
    query_class = query_class.to(scores.device)
    arguments = (scores, query_class, size, padded_size, logit_scale)
    if area_threshold is None:
        return _label(*arguments, prob_threshold)
    labels = _label(*arguments, prob_threshold=0.0)
    areas = torch.bincount(labels.flatten(), minlength=int(query_class.max()) + 1)
    areas[0] = 0
    kept = areas > area_threshold * areas.sum()
    kept[0] = True
    if prob_threshold <= 0 and bool(kept[areas > 0].all()):
        return labels
    return _label(*arguments, prob_threshold, allowed=kept[query_class])


def _label(
    scores: torch.Tensor,
    query_class: torch.Tensor,
    size: tuple[int, int],
    padded_size: tuple[float, float] | None,
    logit_scale: float,
    prob_threshold: float,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """(h, w, Q) scores to (H, W) labels, where only queries ``allowed`` (Q,) bool can win."""
    bands = upsampled_bands(scores, size, padded_size)
    labels = torch.empty(size, dtype=torch.int64, device=scores.device)
    for rows, band in bands:
        # The softmax runs over all queries, also those that cannot win.
        log_sum = (logit_scale * band).logsumexp(-1) if prob_threshold > 0 else None
        if allowed is not None:
            band = band.masked_fill(~allowed, -torch.inf)
        best = band.argmax(-1)
        labels[rows] = query_class[best]
        if log_sum is not None:
            top = band.gather(-1, best[..., None])[..., 0]
            labels[rows][(logit_scale * top - log_sum).exp() < prob_threshold] = 0
    return labels


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
    scores = cosine_scores(features, text)
    query_class = query_class.to(scores.device)
    classes = int(query_class.max()) + 1
    bands = upsampled_bands(scores, size, padded_size)
    output = scores.new_zeros(classes, *size)
    for rows, band in bands:
        probabilities = (logit_scale * band).softmax(-1)
        largest = probabilities.new_zeros(*band.shape[:2], classes)
        largest.scatter_reduce_(-1, query_class.expand_as(band), probabilities, "amax")
        output[:, rows] = largest.permute(2, 0, 1)
    return output
