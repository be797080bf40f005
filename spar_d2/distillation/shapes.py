"""Checks the shapes of targets."""

from __future__ import annotations

import torch

from spar_d2.distillation.match_inputs import EncodedImage
from spar_d2.teacher import SampledTarget


def check_shape(image: EncodedImage, target: torch.Tensor | SampledTarget) -> None:
    """Raise ``ValueError`` unless the target has the shape of the student's features."""
    shape = (target.weighted_sum if isinstance(target, SampledTarget) else target).shape
    check_grid(image, shape)
    if shape[1] != len(image.features):
        raise ValueError(
            f"SPAR.TEACHER.PROJECTION: the targets have {shape[1]} channels, and the features of the student have "
            f"{len(image.features)}; set it to least_squares to map the targets to the features of the student"
        )


def check_grid(image: EncodedImage, shape: torch.Size) -> None:
    """Raise ``ValueError`` unless a target of this shape is on the grid of the student."""
    grid = image.features.shape[1:]
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != grid:
        raise ValueError(
            f"the teacher's target of {image.name} must be (1, D, {grid[0]}, {grid[1]}), on the grid of the student; "
            f"got {tuple(shape)}. With MODEL.SPAR.REFERENCE_COMPAT, some encoders require image sizes in whole patches "
            "(SPAR.DATA.SIDE_MULTIPLE)"
        )
