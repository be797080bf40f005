"""Measuring segmentations and features."""

from spar_d2.evaluation.confusion import confusion_matrix, segmentation_scores
from spar_d2.evaluation.features import FeatureEvaluator
from spar_d2.evaluation.semantic import SemanticEvaluator

__all__ = ["FeatureEvaluator", "SemanticEvaluator", "confusion_matrix", "segmentation_scores"]
