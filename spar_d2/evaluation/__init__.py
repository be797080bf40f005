"""Measuring segmentations."""

from spar_d2.evaluation.confusion import confusion_matrix, segmentation_scores
from spar_d2.evaluation.semantic import SemanticEvaluator

__all__ = ["SemanticEvaluator", "confusion_matrix", "segmentation_scores"]
