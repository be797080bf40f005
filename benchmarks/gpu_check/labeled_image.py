"""Random features and text embeddings with their labels, and a comparison of labels up to ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores
from spar_d2.modeling.postprocessing import cosine_scores, segment_scores

_CELL, _CHANNELS, _SCALE = 16, 64, 40.0
# Scores with a smaller difference are equal up to rounding.
NEAR = 1e-5


@dataclass(frozen=True)
class LabeledImage:
    """Inputs of post-processing.

    Attributes:
        features: (D, h, w) for each augmented copy. The second one is mirrored and has another grid size.
        text: (Q, D) unit vectors.
        classes: (Q,) int64.
        size, padded: (H, W) of the labels, and of the area that the first features cover.
    """

    features: Sequence[torch.Tensor]
    text: torch.Tensor
    classes: torch.Tensor
    size: tuple[int, int]
    padded: tuple[int, int]

    def on(self, device: torch.device) -> LabeledImage:
        features = [view.to(device) for view in self.features]
        return LabeledImage(features, self.text.to(device), self.classes.to(device), self.size, self.padded)

    @cached_property
    def maps(self) -> list[ScoreMap]:
        scores = [cosine_scores(view, self.text) for view in self.features]
        return [ScoreMap(scores[0], self.padded), *(ScoreMap(other, self.size, True) for other in scores[1:])]

    def labels(self, probability: float, area: float | None) -> torch.Tensor:
        return segment_scores(self.maps, self.classes, self.size, _SCALE, probability, area)

    def disagreement(self, one: torch.Tensor, other: torch.Tensor, probability: float) -> tuple[int, int]:
        """Count the pixels with different labels, and those of them that are not near a tie.

        Args:
            one, other: (H, W) int64, on any device; this image must be on the CPU.
            probability: probability threshold of the labels.
        """
        one, other = one.cpu(), other.cpu()
        mask, unequal = one != other, 0
        for place, scores in UpsampledScores(self.maps, self.size).pixels(mask):
            pair = torch.stack([one[place], other[place]], dim=1)
            near = self._of_classes(scores).gather(1, pair).diff(dim=1)[:, 0].abs() <= NEAR
            if probability:
                # One implementation dropped the pixel: the other label's probability is close to the threshold.
                probabilities = self._of_classes((_SCALE * scores).softmax(1)).gather(1, pair)
                near |= ((probabilities - probability).abs() <= _SCALE * NEAR).any(1)
            unequal += int((~near).sum())
        return int(mask.sum()), unequal

    def _of_classes(self, values: torch.Tensor) -> torch.Tensor:
        """Reduce values (n, Q) to (n, classes): the maximum over the queries of each class."""
        largest = values.new_full((len(values), int(self.classes.max()) + 1), -torch.inf)
        return largest.scatter_reduce_(1, self.classes.expand_as(values), values, "amax")


def random_image(words: int, size: tuple[int, int], views: int = 1) -> LabeledImage:
    """Generate random features and text embeddings on the CPU, with two queries per class."""
    generator = torch.Generator().manual_seed(words)
    grids = [tuple(-(-side // (_CELL + 4 * view)) for side in size) for view in range(views)]
    features = [torch.randn(_CHANNELS, *grid, generator=generator) for grid in grids]
    text = F.normalize(torch.randn(words, _CHANNELS, generator=generator), dim=1)
    padded = tuple(side * _CELL for side in grids[0])
    return LabeledImage(features, text, torch.arange(words) // 2, size, padded)
