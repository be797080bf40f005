"""Pyramid backbone with the feature levels that most Detectron2 heads expect."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid
from timm.layers.norm import LayerNorm2d
from torch import nn

from spar_d2.modeling.backbone import CLIP_DENSE, DENSE, FeatureShapes, SPARViT
from spar_d2.modeling.fcclip_interface import TextHooks
from spar_d2.utils.registering import registered

logger = logging.getLogger(__name__)

# Level names and the base-2 logarithms of their strides.
LEVELS = {f"p{k}": k for k in range(2, 8)} | {f"res{k}": k for k in range(2, 6)}
DEFAULT_OUT_FEATURES = ("p2", "p3", "p4", "p5", "p6")
_DEFAULT_CHANNELS = 256
# As in Detectron2's FPN, "p6" subsamples the previous level if both have the same number of channels.
_SUBSAMPLED = (7, 6)
# Strides of dense maps that the levels can be built from. Maps of other strides are resampled to the last one.
_BASES = (4, 8, 16)
# Smallest scale factor of Detectron2's pyramid. Coarser levels start from a max-pooled map.
_LEAST_SCALE = 0.5


@registered(BACKBONE_REGISTRY)
class SPARPyramid(TextHooks, Backbone):
    """Feature levels of strides 4 to 128, built by Detectron2's simple feature pyramid (ViTDet, arXiv:2203.16527).

    Each level is one stage of that pyramid. "p6" subsamples "p5", and "p7" subsamples "p6", unless their channels
    differ. For patch sizes 4 and 8, coarse levels start from the max-pooled dense map. For patch sizes other than 4, 8
    and 16, all levels start from the dense map resampled to stride 16. "p4" and "res4" are the same level. Images are
    padded internally, at the bottom and right, to a multiple of the coarsest stride. A level has ceil(H / stride) x
    ceil(W / stride) positions. For image sizes that are multiples of ``size_divisibility``, neighboring levels differ
    by a factor of exactly 2 in height and width.

    Args:
        net: plain backbone.
        out_features: output names, in the order of the returned dict: "p2" ... "p7", "res2" ... "res5", "dense" (the
            plain map, at the stride of the patch size) and "clip_vis_dense" (FC-CLIP's name for the map that the levels
            are built from; for patch sizes 4, 8 and 16, this is the plain map).
        out_channels: number of channels of all levels (a number or a list of one), or of each level of
            ``out_features`` in order.
        square_pad: side in pixels of the square that frameworks with support for it pad images to; 0 disables it.
        norm: norm of the stages, as in Detectron2's pyramid. "LN" uses a class that optimizers recognize as a norm.

    Raises:
        ValueError: an argument has an invalid value.
    """

    @configurable
    def __init__(
        self,
        net: SPARViT,
        out_features: Sequence[str] = DEFAULT_OUT_FEATURES,
        out_channels: int | Sequence[int] = _DEFAULT_CHANNELS,
        square_pad: int = 0,
        norm: str = "LN",
    ) -> None:
        super().__init__()
        self.net = net
        self.text_side = net.text_side
        names = _check_names(out_features)
        self.square_pad = square_pad
        patch = net.encoder.patch_size
        self._base = patch if patch in _BASES else _BASES[-1]
        channels = _channels_by_level(names, out_channels)
        self._subsampled = set()
        for level in _SUBSAMPLED:
            if level in channels and channels.setdefault(level - 1, channels[level]) == channels[level]:
                self._subsampled.add(level)
        for level in sorted(channels.keys() - self._subsampled):
            self.add_module(f"simfp_{level}", self._stage(2**level, channels[level], norm))
        strides = {name: 2**level for name, level in LEVELS.items()} | {DENSE: patch, CLIP_DENSE: self._base}
        width = net.encoder.embed_dim
        self._out_features = names
        self._out_feature_channels = {name: channels[LEVELS[name]] if name in LEVELS else width for name in names}
        self._out_feature_strides = {name: strides[name] for name in names}
        # Pad so that every level consists of whole positions of the map that it is built from.
        self._multiple = patch if names == [DENSE] else max(self._base, *(strides[n] for n in names if n != DENSE))
        levels = ", ".join(f"{n} (stride {s.stride}, {s.channels} channels)" for n, s in self.output_shape().items())
        logger.info("SPARPyramid outputs: %s", levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        spar = cfg.MODEL.SPAR
        plain: dict = {**SPARViT.from_config(cfg, input_shape), "out_features": (DENSE,)}
        return {
            "net": SPARViT(**plain),
            "out_features": spar.OUT_FEATURES or DEFAULT_OUT_FEATURES,
            "out_channels": _DEFAULT_CHANNELS if spar.OUT_CHANNELS is None else spar.OUT_CHANNELS,
        }

    def _stage(self, stride: int, channels: int, norm: str) -> nn.Module:
        """Build the module that computes a level from the map of stride ``_base``."""
        scale = self._base / stride
        halvings = max(0, round(math.log2(_LEAST_SCALE / scale)))
        shape = {DENSE: ShapeSpec(channels=self.net.encoder.embed_dim, stride=self._base * 2**halvings)}
        # Detectron2's "LN" is not a torch class, so optimizer builders would apply weight decay to it. The pyramid
        # accepts classes as well as names, despite its type hint.
        kind = cast("str", LayerNorm2d) if norm == "LN" else norm
        stage = SimpleFeaturePyramid(_Shape(shape), DENSE, channels, (scale * 2**halvings,), norm=kind).stages[0]
        return nn.Sequential(nn.MaxPool2d(2**halvings), stage) if halvings else stage

    def output_shape(self) -> dict[str, ShapeSpec]:
        return FeatureShapes(super().output_shape())

    @property
    def size_divisibility(self) -> int:
        return self._multiple

    @property
    def padding_constraints(self) -> dict[str, int]:
        # Detectron2's pyramid misspells the first key, so frameworks that read it would not pad.
        return {"size_divisibility": self._multiple, "square_size": self.square_pad}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute maps (B, C, ceil(H / s), ceil(W / s)) of stride s from framework-normalized images (B, 3, H, W)."""
        sides = x.shape[-2:]
        padded = [side + -side % self._multiple for side in sides]
        dense = self.net.encode(x, self._multiple)
        base = self._resampled(dense, padded) if self._base != self.net.encoder.patch_size else dense
        levels: dict[int, torch.Tensor] = {}
        outputs = {}
        for name, stride in self._out_feature_strides.items():
            plain = dense if name == DENSE else base
            level = self._level(LEVELS[name], base, levels) if name in LEVELS else plain
            outputs[name] = level[..., : -(-sides[0] // stride), : -(-sides[1] // stride)]
        return outputs

    def _level(self, level: int, base: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
        if level not in known:
            if level in self._subsampled:
                known[level] = self._level(level - 1, base, known)[..., ::2, ::2]
            else:
                known[level] = self.get_submodule(f"simfp_{level}")(base)
        return known[level]

    def _resampled(self, dense: torch.Tensor, padded: list[int]) -> torch.Tensor:
        """Resample the dense map to stride ``_base``, keeping features aligned with the image."""
        factor = self.net.encoder.patch_size / self._base
        resampled = F.interpolate(dense, scale_factor=factor, mode="bilinear", recompute_scale_factor=False)
        return resampled[..., : padded[0] // self._base, : padded[1] // self._base]


class _Shape(Backbone):
    """Stand-in backbone that only tells Detectron2's pyramid the shape of its input map."""

    def __init__(self, shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        self._shape = shape

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shape

    def forward(self) -> None:
        raise NotImplementedError("this stand-in only provides output_shape()")


def _check_names(names: Sequence[str]) -> list[str]:
    allowed = [*LEVELS, DENSE, CLIP_DENSE]
    if isinstance(names, str) or not names or any(name not in allowed for name in names):
        raise ValueError(
            f"out_features (MODEL.SPAR.OUT_FEATURES) must be a list out of {', '.join(allowed)}; got {names!r}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"out_features (MODEL.SPAR.OUT_FEATURES) must name every level once, got {names!r}")
    return list(names)


def _channels_by_level(names: list[str], channels: int | Sequence[int]) -> dict[int, int]:
    """Map the base-2 logarithm of the stride of each level to its number of channels."""
    key = "out_channels (MODEL.SPAR.OUT_CHANNELS)"
    named = [name for name in names if name in LEVELS]
    if not isinstance(channels, (int, Sequence)) or isinstance(channels, (bool, str)):
        raise ValueError(f"{key} must be one number, or one for each level; got {channels!r}")
    each = [channels] if isinstance(channels, int) else list(channels)
    if len(each) == 1:
        each *= len(named)
    if len(each) != len(named):
        levels = ", ".join(named) or "none"
        raise ValueError(f"{key} must be one number, or one for each level ({levels}); got {channels}")
    if any(not isinstance(number, int) or number < 1 for number in each):
        raise ValueError(f"{key} must be integers of at least 1, got {channels}")
    result: dict[int, int] = {}
    for name, number in zip(named, each):
        if result.setdefault(LEVELS[name], number) != number:
            raise ValueError(f"{key}: {name} occurs twice with different channels; got {channels}")
    return result
