"""The plain backbone: one dense map."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from spar_d2.encoders import DenseEncoder, set_trainable
from spar_d2.modeling.build import encoder_from_config
from spar_d2.modeling.pixels import PixelConversion

logger = logging.getLogger(__name__)

DENSE = "dense"


@BACKBONE_REGISTRY.register()
class SPARViT(Backbone):
    """A dense encoder as a Detectron2 backbone, with one output, "dense", at the stride of the patch.

    Args:
        encoder: the image encoder.
        pixels: brings the framework's input to the encoder's; None where it already is.
    """

    @configurable
    def __init__(self, encoder: DenseEncoder, pixels: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.pixels = pixels
        self._out_features = [DENSE]
        self._out_feature_channels = {DENSE: encoder.embed_dim}
        self._out_feature_strides = {DENSE: encoder.patch_size}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        spar = cfg.MODEL.SPAR
        encoder = encoder_from_config(cfg)
        # Decided before an optimizer looks at the model, so that it never sees frozen weights.
        names = set_trainable(encoder, spar.TRAINABLE)
        trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        logger.info(
            "Encoder %s (%s): %d of %d parameters trainable (%s: %d tensors)%s",
            spar.ENCODER,
            spar.PRETRAINED or "random weights",
            trained,
            sum(p.numel() for p in encoder.parameters()),
            spar.TRAINABLE,
            len(names),
            "".join(f"\n  {name}" for name in names),
        )
        pixels = None
        if spar.CONVERT_PIXELS:
            framework = (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT)
            pixels = PixelConversion(*framework, encoder.pixel_mean, encoder.pixel_std)
        return {"encoder": encoder, "pixels": pixels}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) as the framework normalised it, any size, to {"dense": (B, D, ceil(H / p), ceil(W / p))}."""
        return {DENSE: self.encoder(x if self.pixels is None else self.pixels(x))}
