"""Refinement of dense features and class scores, independent of Detectron2."""

from spar_d2.refine.anyup import AnyUp, imagenet_normalized
from spar_d2.refine.anyup_weights import load_anyup, save_anyup

__all__ = ["AnyUp", "imagenet_normalized", "load_anyup", "save_anyup"]
