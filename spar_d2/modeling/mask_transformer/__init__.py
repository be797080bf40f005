"""Mask transformer: panoptic and semantic segmentation by mask classification on a dense encoder."""

from spar_d2.modeling.mask_transformer.head import MaskTransformerHead
from spar_d2.modeling.mask_transformer.losses import Criterion
from spar_d2.modeling.mask_transformer.segmentor import MaskTransformer

__all__ = ["Criterion", "MaskTransformer", "MaskTransformerHead"]
