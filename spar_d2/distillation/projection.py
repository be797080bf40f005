"""Projection of a teacher's features to the feature space of the student."""

from __future__ import annotations

import dataclasses
import logging

import torch
from detectron2.utils import comm

from spar_d2.encoders.precision import full_float32
from spar_d2.teacher import SampledTarget

logger = logging.getLogger(__name__)


class LeastSquaresProjection:
    """Affine map from the teacher's features to the student's, fitted once and fixed afterwards.

    It minimizes the squared error to the features of the student before training, over the cells of the first images.

    Args:
        images: number of images to fit on, over all processes.

    Raises:
        ValueError: ``images`` is less than 1.
    """

    def __init__(self, images: int) -> None:
        if images < 1:
            raise ValueError(f"projection_images (SPAR.TEACHER.PROJECTION_IMAGES) must be at least 1, got {images}")
        self.images = images
        # Normal equations, float64: products of teacher features and 1 with each other, and with student features.
        self._state: dict[str, torch.Tensor] = {}

    @property
    def fitted(self) -> bool:
        return "matrix" in self._state

    def add(self, targets: list[torch.Tensor], features: list[torch.Tensor]) -> None:
        """Add images to the fit. All processes must call it together; it fits after the last image.

        Args:
            targets: targets (1, D, h, w) of the teacher.
            features: features (D', h, w) of the student for the same images.
        """
        # (cells, D + 1), (cells, D')
        inputs = torch.cat([_columns(target[0]) for target in targets])
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        outputs = torch.cat([_columns(each.detach()) for each in features])
        sums = {
            "gram": inputs.T @ inputs,
            "cross": inputs.T @ outputs,
            "square": outputs.square().sum(),
            "count": inputs.new_tensor(len(targets)),
        }
        for name, value in sums.items():
            if comm.get_world_size() > 1:
                torch.distributed.all_reduce(value)
            self._state[name] = self._state[name].to(value) + value if name in self._state else value
        if self._state["count"] >= self.images:
            self._fit()

    def _fit(self) -> None:
        gram, cross = (self._state[name].cpu() for name in ("gram", "cross"))
        # This driver finds the solution of smallest norm where features are linearly dependent.
        matrix = torch.linalg.lstsq(gram, cross, driver="gelsd").solution
        square, cells = self._state["square"].item(), gram[-1, -1].item()
        variance = square - (cross[-1].square().sum() / cells).item()
        explained = 1 - (square - (matrix * cross).sum().item()) / variance if variance else float("nan")
        logger.info(
            "SPAR.TEACHER.PROJECTION: fitted on %d images; explains %.1f%% of the variance of the student's features",
            int(self._state["count"]), 100 * explained,
        )  # fmt: skip
        self._state = {"matrix": matrix.float()}

    def __call__(self, target: torch.Tensor | SampledTarget) -> torch.Tensor | SampledTarget:
        """Map a target (1, D, h, w), or a sampled one, to (1, D', h, w)."""
        if isinstance(target, SampledTarget):
            return dataclasses.replace(target, weighted_sum=self._map(target.weighted_sum, target.weight))
        return self._map(target, torch.ones_like(target[:, :1]))

    def _map(self, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        matrix = self._state["matrix"] = self._state["matrix"].to(target.device)
        if len(matrix) != target.shape[1] + 1:
            raise ValueError(
                f"SPAR.TEACHER.PROJECTION was fitted to a teacher with {len(matrix) - 1} channels, "
                f"and this one has {target.shape[1]}; start a new run, without --resume"
            )
        with full_float32(target.device):
            # The constant is weighted as the features: it is part of every window.
            return torch.einsum("bchw,cd->bdhw", torch.cat([target, weight], dim=1), matrix)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value.cpu() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._state = dict(state)


def _columns(features: torch.Tensor) -> torch.Tensor:
    """(D, h, w) to (h * w, D) float64."""
    return features.flatten(1).T.double()
