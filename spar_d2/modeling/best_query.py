"""Best query of every pixel: a fused Triton kernel on a GPU, row chunks elsewhere."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores

# Environment variable that disables the kernel if set to 0.
SWITCH = "SPAR_FUSED_LABELS"
# On a CPU, up to this fraction of pixels is processed as a pixel list rather than in row chunks.
_MAX_LISTED_FRACTION = 0.1

logger = logging.getLogger(__name__)


def best_query(
    upsampled: UpsampledScores, logit_scale: float, prob_threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the query with the highest score at every pixel; ties go to the first query.

    On a CUDA device with Triton, scores are upsampled and compared in one kernel. The environment variable
    SPAR_FUSED_LABELS=0 disables it. Elsewhere, or if Triton cannot compile the kernel (logged once), scores are
    computed in row chunks. The two methods round differently: if the two best scores of a pixel are equal up to
    rounding, either may win, unless they are equal in the whole map. A NaN score never wins in the kernel and always
    wins in row chunks. On a CUDA device, the host does not wait.

    Args:
        upsampled: scores of Q queries.
        logit_scale: factor before the softmax over all queries.
        prob_threshold: 0..1; 0 disables it.

    Returns:
        best: (H, W) int64 in 0..Q - 1.
        weak: (H, W) bool, True where the probability of ``best`` is below ``prob_threshold``; empty if that is 0.
    """
    return _fused(upsampled, logit_scale, prob_threshold) or _in_bands(upsampled, logit_scale, prob_threshold)


def best_allowed_query(
    upsampled: UpsampledScores,
    logit_scale: float,
    prob_threshold: float,
    allowed: torch.Tensor,
    best: torch.Tensor,
    weak: torch.Tensor,
    areas: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace disallowed queries by the best allowed one, or by query 0 if none is allowed.

    The softmax still runs over all queries. On a CUDA device, the host does not wait for the kernel, which skips tiles
    without disallowed queries; the fallback waits once.

    Args:
        upsampled, logit_scale, prob_threshold: as for :func:`best_query`.
        allowed: (Q,) bool.
        best, weak: results of :func:`best_query`; may be modified in place.
        areas: (Q,) int64, number of pixels of each query in ``best``.

    Returns:
        Same as :func:`best_query`.
    """
    result = _fused(upsampled, logit_scale, prob_threshold, allowed, best, weak)
    if result is None:
        removed = int(areas.masked_fill(allowed, 0).sum())
        _replace_in_bands(upsampled, logit_scale, prob_threshold, allowed, best, weak, removed)
        result = best, weak
    return result


def _in_bands(
    upsampled: UpsampledScores, logit_scale: float, prob_threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.empty(upsampled.size, dtype=torch.int64, device=upsampled.device)
    shape = upsampled.size if prob_threshold > 0 else 0
    weak = torch.empty(shape, dtype=torch.bool, device=upsampled.device)
    for place, scores in upsampled.bands():
        highest, best[place] = scores.max(-1)
        if prob_threshold > 0:
            weak[place] = 1 / _exponentials(scores, highest, logit_scale) < prob_threshold
    return best, weak


def _replace_in_bands(
    upsampled: UpsampledScores,
    logit_scale: float,
    prob_threshold: float,
    allowed: torch.Tensor,
    best: torch.Tensor,
    weak: torch.Tensor,
    removed: int,
) -> None:
    """Replace in place; ``removed`` is the number of pixels with a disallowed query."""
    if removed == 0:
        return
    by_pixel = upsampled.device.type == "cpu" and removed < _MAX_LISTED_FRACTION * best.numel()
    for place, scores in upsampled.pixels(~allowed[best]) if by_pixel else upsampled.bands():
        top, best[place] = scores.masked_fill(~allowed, -torch.inf).max(-1)
        if prob_threshold > 0:
            highest = scores.amax(-1)
            total = _exponentials(scores, highest, logit_scale)
            weak[place] = ((top - highest) * logit_scale).exp() / total < prob_threshold


def _exponentials(scores: torch.Tensor, highest: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """Sum the exponentials of all scores relative to the highest; overwrites the scores."""
    return scores.sub_(highest[..., None]).mul_(logit_scale).exp_().sum(-1)


_unusable = False


def _fused(
    upsampled: UpsampledScores,
    logit_scale: float,
    prob_threshold: float,
    allowed: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
    weak: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run the kernel; returns None if it is not available."""
    global _unusable
    if upsampled.device.type != "cuda" or _operator is None or _unusable or os.environ.get(SWITCH) == "0":
        return None
    covered = [float(side.covered) for grid in upsampled.grids for side in (grid.down, grid.across)]
    maps = [grid.scores for grid in upsampled.maps], covered, [grid.mirrored for grid in upsampled.maps]
    try:
        return _operator(*maps, *upsampled.size, logit_scale, prob_threshold, allowed, best, weak)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # for example: no C compiler, an old GPU, or an unwritable cache folder
        _unusable = True
        logger.warning(
            f"Triton cannot compile or start the label kernel. Labels are computed in row chunks "
            f"instead, which is slower but equivalent. {SWITCH}=0 disables the kernel. {type(error).__name__}: {error}"
        )
        return None


def _from_plain(scores: list, covered: list[float], mirrored: list[bool], height: int, width: int) -> UpsampledScores:
    padded = zip(covered[::2], covered[1::2])
    return UpsampledScores([ScoreMap(*grid) for grid in zip(scores, padded, mirrored)], (height, width))


def _operator_on_cuda(scores, covered, mirrored, height, width, logit_scale, prob_threshold, allowed, best, weak):
    from spar_d2.modeling.best_query_triton import launch

    upsampled = _from_plain(scores, covered, mirrored, height, width)
    return launch(upsampled, logit_scale, prob_threshold, allowed, best, weak)


def _operator_elsewhere(scores, covered, mirrored, height, width, logit_scale, prob_threshold, allowed, best, weak):
    upsampled = _from_plain(scores, covered, mirrored, height, width)
    if best is None:
        return _in_bands(upsampled, logit_scale, prob_threshold)
    # A custom operator must not return its inputs.
    best, weak = best.clone(), weak.clone()
    removed = int((~allowed[best]).sum())
    _replace_in_bands(upsampled, logit_scale, prob_threshold, allowed, best, weak, removed)
    return best, weak


def _operator_without_values(scores, covered, mirrored, height, width, logit_scale, prob_threshold, *_):
    best = scores[0].new_empty(height, width, dtype=torch.int64)
    return best, scores[0].new_empty((height, width) if prob_threshold > 0 else 0, dtype=torch.bool)


def _define_operator():
    """Wrap the kernel as a PyTorch operator, so that profilers and dispatch modes see it; None without Triton."""
    if not hasattr(torch.library, "custom_op") or importlib.util.find_spec("triton") is None:
        return None
    operator = torch.library.custom_op(
        "spar_d2::best_query",
        _operator_elsewhere,
        mutates_args=(),
        schema="(Tensor[] scores, float[] covered, bool[] mirrored, int height, int width, float logit_scale, "
        "float prob_threshold, Tensor? allowed, Tensor? best, Tensor? weak) -> (Tensor, Tensor)",
    )
    operator.register_kernel("cuda")(_operator_on_cuda)
    operator.register_fake(_operator_without_values)
    return operator


_operator = _define_operator()
