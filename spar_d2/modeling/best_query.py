"""The best query of every pixel: by a fused kernel on a GPU, in bands elsewhere."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores

# Set it to 0 to do without the kernel.
SWITCH = "SPAR_FUSED_LABELS"
# Share of pixels up to which a CPU is faster taking them one by one than all in bands.
_FEW = 0.1

logger = logging.getLogger(__name__)


def best_query(
    upsampled: UpsampledScores, logit_scale: float, prob_threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The query with the highest score at every pixel; of equal ones the first.

    On a CUDA device with Triton, scores are upsampled and compared in one kernel; the environment variable
    SPAR_FUSED_LABELS=0 turns it off. Elsewhere, and where Triton cannot compile it (that is logged once), bands of
    scores are. The two round differently: a pixel whose two best scores are equal up to rounding may get either, unless
    they are equal in every cell. A score that is not a number never wins in the kernel and always in bands. On a CUDA
    device the host does not wait.

    Args:
        upsampled: scores of Q queries.
        logit_scale: factor before the softmax over all queries.
        prob_threshold: 0..1; 0 for none.

    Returns:
        best: (H, W) int64 in 0..Q - 1.
        weak: (H, W) bool, whether the probability of ``best`` is below ``prob_threshold``; empty without one.
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
    """Replace queries that are not allowed by the best of those that are; query 0 where none is.

    The softmax still runs over all queries. On a CUDA device the host waits at most once, and not for the kernel, which
    passes over tiles in which nothing is to be replaced.

    Args:
        upsampled, logit_scale, prob_threshold: as for :func:`best_query`.
        allowed: (Q,) bool.
        best, weak: what that returned; may be changed.
        areas: (Q,) int64, pixels of each query in ``best``.

    Returns:
        As :func:`best_query`.
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
    """In place; ``removed`` is the number of pixels whose query is not allowed."""
    if removed == 0:
        return
    few = upsampled.device.type == "cpu" and removed < _FEW * best.numel()
    for place, scores in upsampled.pixels(~allowed[best]) if few else upsampled.bands():
        top, best[place] = scores.masked_fill(~allowed, -torch.inf).max(-1)
        if prob_threshold > 0:
            highest = scores.amax(-1)
            total = _exponentials(scores, highest, logit_scale)
            weak[place] = ((top - highest) * logit_scale).exp() / total < prob_threshold


def _exponentials(scores: torch.Tensor, highest: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """The sum of exponentials of all queries relative to the highest; overwrites the scores."""
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
    """The result of the kernel; None where there is none."""
    global _unusable
    if upsampled.device.type != "cuda" or _operator is None or _unusable or os.environ.get(SWITCH) == "0":
        return None
    covered = [float(side.covered) for grid in upsampled.grids for side in (grid.down, grid.across)]
    maps = [grid.scores for grid in upsampled.maps], covered, [grid.mirrored for grid in upsampled.maps]
    try:
        return _operator(*maps, *upsampled.size, logit_scale, prob_threshold, allowed, best, weak)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # Of many kinds: no C compiler, an old GPU, a folder that cannot be written, ...
        _unusable = True
        logger.warning(
            f"Triton cannot compile or start the kernel for labels, which are now computed in bands: slower, otherwise "
            f"the same. {SWITCH}=0 does without it from the start. {type(error).__name__}: {error}"
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
    # An operator returns tensors of its own.
    best, weak = best.clone(), weak.clone()
    removed = int((~allowed[best]).sum())
    _replace_in_bands(upsampled, logit_scale, prob_threshold, allowed, best, weak, removed)
    return best, weak


def _operator_without_values(scores, covered, mirrored, height, width, logit_scale, prob_threshold, *_):
    best = scores[0].new_empty(height, width, dtype=torch.int64)
    return best, scores[0].new_empty((height, width) if prob_threshold > 0 else 0, dtype=torch.bool)


def _define_operator():
    """The kernel as one operator of PyTorch, so that what counts or replaces operators sees it; None without Triton."""
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
