"""Detectron2 evaluator for the similarity of features to a teacher's. Needs no labels or class names."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from spar_d2.utils.processes import gather_when_done

logger = logging.getLogger(__name__)


class FeatureEvaluator(DatasetEvaluator):
    """Compares a model's features to its distillation targets.

    Args:
        build_target: builds a function from an input's "image" (3, H, W) to its target (D, h, w); called when the first
            image is processed.
        distributed: sum over all processes; only the main process returns scores.
    """

    def __init__(self, build_target: Callable[[], Callable[[torch.Tensor], torch.Tensor]], distributed: bool = True):
        self._build_target = build_target
        self._target: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        # Sums of cosines, squared errors and squared deviations, and the number of patches; on the device of the
        # features.
        self._sums = torch.zeros(4, dtype=torch.float64)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Process a batch of outputs with "features" (D, h, w).

        Raises:
            ValueError: an output has no features, or their shape differs from that of the target.
        """
        if self._target is None:
            self._target = self._build_target()
        for record, output in zip(inputs, outputs):
            if "features" not in output:
                raise ValueError(
                    f'FeatureEvaluator needs "features" in an output, got {sorted(output)}; '
                    'set MODEL.SPAR.OUTPUT to "features"'
                )
            features, target = output["features"].double(), self._target(record["image"]).double()
            if features.shape != target.shape:
                raise ValueError(
                    f"features and target differ in shape: {tuple(features.shape)} and {tuple(target.shape)}"
                )
            spread = (target - target.mean((1, 2), keepdim=True)).square().sum()
            sums = [
                F.cosine_similarity(features, target, dim=0).sum(),
                (features - target).square().sum() / len(target),
                spread / len(target),
                spread.new_full((), target[0].numel()),
            ]
            self._sums = self._sums.to(spread.device) + torch.stack(sums)

    def evaluate(self) -> OrderedDict | None:
        """Compute scores over all patches of all images, as {"features": {...}}; None except in the main process.

        Returns:
            "cosine": mean cosine similarity to the target, in percent. "mse": mean squared error, which is the
            distillation loss. "unexplained": squared error in percent of the variance of the targets within images.
        """
        sums = self._sums.cpu().numpy()
        if self.distributed:
            gathered = gather_when_done(sums)
            if not comm.is_main_process():
                return None
            sums = np.sum(gathered, axis=0)
        if not sums[3]:
            raise RuntimeError("there were no images to evaluate")
        cosine, error, spread, cells = sums
        scores = {
            "cosine": 100 * cosine / cells,
            "mse": error / cells,
            "unexplained": 100 * error / spread if spread else float("nan"),
        }
        logger.info("Against the teacher: %s", ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        return OrderedDict(features=scores)
