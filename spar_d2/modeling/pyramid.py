"""The pyramid backbone: the levels that most Detectron2 heads ask for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from spar_d2.modeling.backbone import DENSE, SPARViT

_SCALES = (4.0, 2.0, 1.0, 0.5)


@BACKBONE_REGISTRY.register()
class SPARPyramid(SimpleFeaturePyramid):
    """Detectron2's simple feature pyramid (ViTDet, arXiv:2203.16527) on the dense map.

    Levels lie at 4, 2, 1 and 1/2 of the dense map's resolution, and one more at half of the last: "p2" to "p6" for a
    patch of 16. Images of any size are padded inside, at the right and bottom, so that neighbouring levels differ by
    exactly 2 in height and width.

    Args:
        net: the plain backbone; its patch must be a power of two.
        out_channels: channels of every level.

    Raises:
        ValueError: another patch size, or no channels.
    """

    @configurable
    def __init__(self, net: SPARViT, out_channels: int = 256) -> None:
        patch = net.encoder.patch_size
        if patch & (patch - 1):
            raise ValueError(
                f"SPARPyramid needs an encoder whose patch is a power of two, as its levels differ by 2; got {patch}. "
                "Choose another MODEL.SPAR.ENCODER, or MODEL.BACKBONE.NAME SPARViT"
            )
        if out_channels < 1:
            raise ValueError(f"out_channels (MODEL.SPAR.PYRAMID_CHANNELS) must be at least 1, got {out_channels}")
        top = LastLevelMaxPool()
        # It takes "p5" unless told otherwise: levels are named by the logarithm of their stride.
        top.in_feature = f"p{int(math.log2(patch / _SCALES[-1]))}"
        super().__init__(net, DENSE, out_channels, _SCALES, top_block=top)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        return {"net": SPARViT(cfg, input_shape), "out_channels": cfg.MODEL.SPAR.PYRAMID_CHANNELS}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        # Its parent misspells the key, so that frameworks that read it here would not pad.
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) as the framework normalised it, any size, to one (B, C, h, w) per level."""
        multiple = self._size_divisibility
        return super().forward(F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple)))
