"""Classes of queries: by a learned layer, or by comparison with text embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spar_d2.modeling.example_embeddings import ClassVectors

# Initial scale of the cosine similarities, and its largest value, as in CLIP.
_SCALE, _LARGEST_SCALE = 14.0, 100.0


class LearnedClassifier(nn.Module):
    """A linear layer to the logits of fixed classes and of no object.

    Args:
        width: channels C of the query embeddings.
        classes: number of classes K.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.predictor = nn.Linear(width, classes + 1)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute logits (..., K + 1) of embeddings (..., C); the last class stands for no object."""
        return self.predictor(embeddings)


class TextClassifier(nn.Module):
    """Compares projected query embeddings with text embeddings. The classes may change at any time.

    Args:
        width: channels C of the query embeddings.
        text_width: channels D of the text embeddings.

    """

    _vectors: ClassVectors
    _classes: int

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, text_width))
        self.no_object = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))

    def set_classes(self, vectors: ClassVectors, classes: int) -> None:
        """Use other classes.

        Args:
            vectors: class vectors, on the device of the module.
            classes: number of classes K.
        """
        self._vectors, self._classes = vectors, classes

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Compare unit vectors (..., D) with the classes: the cosine (..., K) of the best synonym of each class."""
        # Mixed precision would round cosines, which are multiplied by up to 100.
        with torch.autocast(features.device.type, enabled=False):
            scores = features.float() @ self._vectors.vectors.T
        index = self._vectors.query_class.expand(scores.shape)
        return scores.new_full((*scores.shape[:-1], self._classes), -1.0).scatter_reduce(-1, index, scores, "amax")

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute logits (..., K + 1) of embeddings (..., C); the last class stands for no object."""
        projected = F.normalize(self.projection(embeddings).float(), dim=-1)
        scores = self.scores(projected) * self.log_scale.exp().clamp(max=_LARGEST_SCALE)
        return torch.cat([scores, self.no_object(embeddings).float()], dim=-1)


def pooled_features(features: torch.Tensor, masks: torch.Tensor, cells: int = 0) -> torch.Tensor:
    """Average dense features over the inside of masks, by mask pooling as in FC-CLIP (arXiv:2308.02487).

    Args:
        features: (B, D, h, w).
        masks: (B, Q, h', w') logits on a grid that is a multiple of the features' grid.
        cells: this multiple, h' / h, which must be given if sizes are symbols; 0 computes it.

    Returns:
        (B, Q, D) unit vectors. Patches are weighted with the part of them that is inside; masks that are empty are
        weighted with their probabilities.
    """
    features, masks = features.float(), masks.float()
    cells = cells or masks.shape[2] // features.shape[2]
    inside = F.avg_pool2d((masks > 0).float(), cells).flatten(2)
    probable = F.avg_pool2d(masks.sigmoid(), cells).flatten(2)
    weights = torch.where(inside.any(2, keepdim=True), inside, probable)
    return F.normalize(weights @ features.flatten(2).transpose(1, 2), dim=-1)


def two_way(
    logits: torch.Tensor,
    cosines: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
    weights: tuple[float, float],
) -> torch.Tensor:
    """Combine the classes of queries with those of the features inside of their masks (FC-CLIP).

    The result is the geometric mean of both probabilities, with weights ``1 - w`` (query) and ``w`` (features).

    Args:
        logits: (..., K + 1) logits of the queries; the last class stands for no object.
        cosines: (..., K) cosines of the pooled features.
        scale: factor of the cosines before the softmax.
        seen: (K,) bool, whether a class was trained.
        weights: weight ``w`` of the pooled features for seen and for other classes, in 0..1.

    Returns:
        (..., K + 1) probabilities.
    """
    inside = logits[..., :-1].log_softmax(-1)
    outside = (cosines * scale).log_softmax(-1)
    weight = seen * weights[0] + ~seen * weights[1]
    classes = ((1 - weight) * inside + weight * outside).softmax(-1)
    nothing = logits.softmax(-1)[..., -1:]
    return torch.cat([classes * (1 - nothing), nothing], dim=-1)
