"""The distillation loss: plain regression of dense features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spar_d2.teacher import SampledTarget


def distillation_loss(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over all elements (SPAR, the training objective).

    Args:
        student, target: (B, D, h, w), not normalized; computed in float32 whatever their types.

    Raises:
        ValueError: shapes differ.
    """
    _check_shapes(student, target)
    return (student.float() - target.float()).square().mean()


def sampled_distillation_loss(student: torch.Tensor, target: SampledTarget) -> torch.Tensor:
    """Loss against a few random windows, with the full loss's gradient in expectation.

    With ``w = target.weight`` and ``t = weighted_sum / w``, it is ``mean(w * (student - t) ** 2)`` over all cells,
    those with ``w = 0`` counting as zero. Its gradient is ``2 * (w * student - weighted_sum)``, over the number of
    elements: linear in the windows drawn, so that its mean over all draws is that of :func:`distillation_loss`.

    Args:
        student: (B, D, h, w).
        target: of the same size.

    Raises:
        ValueError: shapes differ.
    """
    _check_shapes(student, target.weighted_sum)
    weight = target.weight
    mean = target.weighted_sum / torch.where(weight > 0, weight, torch.ones_like(weight))
    return (weight * (student.float() - mean).square()).mean()


@torch.no_grad()
def mean_cosine(student: torch.Tensor, target: torch.Tensor | SampledTarget) -> torch.Tensor:
    """Mean cosine of student and target over all cells, -1..1; of sampled windows over the cells that they see.

    It stays on the device, () float32, so that nobody waits for it.

    Args:
        student: (B, D, h, w).
        target: of the same size.
    """
    if isinstance(target, SampledTarget):
        # The sum has the direction of the mean.
        weight, target = target.weight[:, 0], target.weighted_sum
        cosine = F.cosine_similarity(student.float(), target, dim=1)
        return (weight * cosine).sum() / weight.sum()
    return F.cosine_similarity(student.float(), target.float(), dim=1).mean()


def _check_shapes(student: torch.Tensor, target: torch.Tensor) -> None:
    if student.shape != target.shape:
        raise ValueError(
            f"student and target differ in shape: {tuple(student.shape)} and {tuple(target.shape)}; with "
            "MODEL.SPAR.REFERENCE_COMPAT some encoders need images in whole patches (SPAR.DATA.SIDE_MULTIPLE)"
        )
