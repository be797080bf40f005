"""Refinement of dense class scores and features, in plain PyTorch."""

from spar_d2.refine.best_classes import best_classes
from spar_d2.refine.patch_propagation import PatchGraph, lposs
from spar_d2.refine.pixel_propagation import PixelGraph, lposs_plus

__all__ = ["PatchGraph", "PixelGraph", "best_classes", "lposs", "lposs_plus"]
