"""Evaluation of segmentations and features."""

import importlib
from typing import TYPE_CHECKING

from spar_d2.evaluation.confusion_matrix import confusion_matrix, segmentation_scores

# Imported eagerly: importing the submodule of the same name later would replace the function.
from spar_d2.evaluation.panoptic.quality import panoptic_quality

if TYPE_CHECKING:
    from spar_d2.evaluation.feature_evaluator import FeatureEvaluator
    from spar_d2.evaluation.panoptic.evaluator import PanopticEvaluator
    from spar_d2.evaluation.semantic_evaluator import SemanticEvaluator

__all__ = [
    "FeatureEvaluator",
    "PanopticEvaluator",
    "SemanticEvaluator",
    "confusion_matrix",
    "panoptic_quality",
    "segmentation_scores",
]

# Imported lazily, because these need Detectron2.
_EVALUATORS = {
    "FeatureEvaluator": "feature_evaluator",
    "PanopticEvaluator": "panoptic.evaluator",
    "SemanticEvaluator": "semantic_evaluator",
}


def __getattr__(name: str):
    if name in _EVALUATORS:
        return getattr(importlib.import_module(f"spar_d2.evaluation.{_EVALUATORS[name]}"), name)
    raise AttributeError(f"module 'spar_d2.evaluation' has no attribute '{name}'")
