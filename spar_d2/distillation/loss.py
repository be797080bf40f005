"""Distillation losses: regression of dense features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spar_d2.teacher import SampledTarget


def distillation_loss(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all elements, the training objective of SPAR.

    Args:
        student, target: (B, D, h, w) unnormalized features of any dtype; the loss is computed in float32.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(student, target)
    return (student.float() - target.float()).square().mean()


def sampled_distillation_loss(student: torch.Tensor, target: SampledTarget) -> torch.Tensor:
    """Loss for a sampled target; its expected gradient is the gradient of :func:`distillation_loss`.

    With ``w = target.weight`` and ``t = weighted_sum / w``, the loss is ``mean(w * (student - t) ** 2)``, where grid
    cells with ``w = 0`` count as zero. Up to the number of elements, its gradient is
    ``2 * (w * student - weighted_sum)``. It is linear in the sampled windows, and therefore unbiased.

    Args:
        student: (B, D, h, w) features.
        target: sampled target of the same size.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(student, target.weighted_sum)
    weight = target.weight
    mean = target.weighted_sum / torch.where(weight > 0, weight, torch.ones_like(weight))
    return (weight * (student.float() - mean).square()).mean()


@torch.no_grad()
def mean_cosine(student: torch.Tensor, target: torch.Tensor | SampledTarget) -> torch.Tensor:
    """Mean cosine similarity of student and target over all grid cells.

    For a sampled target, the mean is weighted by ``target.weight``.

    Args:
        student: (B, D, h, w) features.
        target: target of the same size.

    Returns:
        () float32 in -1..1, on the device, to avoid a synchronization.
    """
    if isinstance(target, SampledTarget):
        # The weighted sum has the same direction as the mean.
        weight, target = target.weight[:, 0], target.weighted_sum
        cosine = F.cosine_similarity(student.float(), target, dim=1)
        return (weight * cosine).sum() / weight.sum()
    return F.cosine_similarity(student.float(), target.float(), dim=1).mean()


def _check_shapes(student: torch.Tensor, target: torch.Tensor) -> None:
    if student.shape != target.shape:
        raise ValueError(
            f"student and target differ in shape: {tuple(student.shape)} and {tuple(target.shape)}; with "
            "MODEL.SPAR.REFERENCE_COMPAT, some encoders require image sizes in whole patches (SPAR.DATA.SIDE_MULTIPLE)"
        )
