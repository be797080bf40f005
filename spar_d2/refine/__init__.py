"""Refinement of dense features and class scores, in plain PyTorch."""

from spar_d2.refine.anyup import AnyUp, imagenet_normalized
from spar_d2.refine.anyup_weights import load_anyup, save_anyup
from spar_d2.refine.best_classes import best_classes
from spar_d2.refine.patch_propagation import PatchGraph, lposs
from spar_d2.refine.pixel_propagation import PixelGraph, lposs_plus

__all__ = [
    "AnyUp",
    "PatchGraph",
    "PixelGraph",
    "best_classes",
    "imagenet_normalized",
    "load_anyup",
    "lposs",
    "lposs_plus",
    "save_anyup",
]
