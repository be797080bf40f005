"""Plain backbone with a single dense feature map."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from spar_d2.encoders import DenseEncoder, EncoderSpec, set_trainable
from spar_d2.encoders.registry import build
from spar_d2.encoders.trainable import parameter_counts
from spar_d2.modeling.build import encoder_spec, precision_from_config
from spar_d2.modeling.fcclip_interface import WIDTH_KEY, TextHooks, TextSide
from spar_d2.modeling.pixels import PixelConversion
from spar_d2.utils.registering import registered

logger = logging.getLogger(__name__)

DENSE = "dense"
# FC-CLIP's name for the same map.
CLIP_DENSE = "clip_vis_dense"


@registered(BACKBONE_REGISTRY)
class SPARViT(TextHooks, Backbone):
    """A dense encoder as a Detectron2 backbone, with one output at the stride of the patch size.

    Args:
        encoder: image encoder, or the spec to build it from. Text embeddings are available only with a spec.
        pixel_mean, pixel_std: pixel statistics that the framework normalizes with, in its channel order, for pixels in
            0..255 (``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD``). This normalization is replaced by the encoder's. None
            means that the input is RGB and already normalized for the encoder.
        input_format: channel order of the framework, "BGR" or "RGB" (``INPUT.FORMAT``); required with ``pixel_mean``.
        trainable: parameters to train, see :func:`spar_d2.encoders.set_trainable`; None leaves the encoder unchanged.
        precision, compile, checkpointing: see :meth:`spar_d2.encoders.DenseEncoder.accelerate`. With a precision of
            None, all three are ignored.
        out_features: "dense", "clip_vis_dense" (FC-CLIP's name for the same map), or both.
        text_width: width of the text embeddings that the framework expects (``MODEL.FC_CLIP.EMBED_DIM``), or None.

    Raises:
        ValueError: an argument has an invalid value; or as :func:`spar_d2.encoders.build_encoder`.
    """

    @configurable
    def __init__(
        self,
        encoder: DenseEncoder | EncoderSpec,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        input_format: str | None = None,
        trainable: str | None = None,
        precision: str | None = None,
        compile: bool = False,
        checkpointing: bool = False,
        out_features: Sequence[str] = (DENSE,),
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        spec = encoder if isinstance(encoder, EncoderSpec) else None
        self.encoder: DenseEncoder = build(encoder) if isinstance(encoder, EncoderSpec) else encoder
        if text_width not in (None, self.encoder.embed_dim):
            name = spec.name if spec else type(self.encoder).__name__
            raise ValueError(f"{WIDTH_KEY} must be {self.encoder.embed_dim}, the width of {name}; got {text_width}")
        self.pixels: PixelConversion | None = None
        if pixel_mean is not None:
            if input_format is None:
                # A wrong guess would silently swap the color channels.
                raise ValueError('input_format (INPUT.FORMAT) must be "BGR" or "RGB" if pixel_mean is given, got None')
            encoder_statistics = (self.encoder.pixel_mean, self.encoder.pixel_std)
            self.pixels = PixelConversion(
                pixel_mean, [1.0] * 3 if pixel_std is None else pixel_std, input_format, *encoder_statistics
            )
        if precision is not None:
            self.encoder.accelerate(precision, compile, checkpointing)
        if trainable is not None:
            # Freeze before the optimizer is built, so that it never sees frozen weights.
            _log_trainable(self.encoder, spec, trainable, set_trainable(self.encoder, trainable))
        self.text_side = TextSide(spec, self.encoder)
        self._out_features = _check_outputs(out_features)
        self._out_feature_channels = dict.fromkeys(self._out_features, self.encoder.embed_dim)
        self._out_feature_strides = dict.fromkeys(self._out_features, self.encoder.patch_size)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        spar = cfg.MODEL.SPAR
        fc_clip = CLIP_DENSE in spar.OUT_FEATURES and "EMBED_DIM" in cfg.MODEL.get("FC_CLIP", {})
        return {
            "encoder": encoder_spec(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN if spar.CONVERT_PIXELS else None,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "trainable": spar.TRAINABLE,
            "precision": precision_from_config(cfg),
            "compile": spar.COMPILE,
            "checkpointing": spar.CHECKPOINTING,
            "out_features": spar.OUT_FEATURES or (DENSE,),
            "text_width": cfg.MODEL.FC_CLIP.EMBED_DIM if fc_clip else None,
        }

    @property
    def size_divisibility(self) -> int:
        # Heads that compare their output with labels of the padded size need whole patches.
        return self.encoder.patch_size

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self.size_divisibility}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return FeatureShapes(super().output_shape())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute {"dense": (B, D, ceil(H / p), ceil(W / p))} of framework-normalized images (B, 3, H, W)."""
        return dict.fromkeys(self._out_features, self.encode(x))

    def convert(self, x: torch.Tensor) -> torch.Tensor:
        """Convert framework-normalized images (B, 3, H, W) to RGB, normalized for the encoder."""
        return x if self.pixels is None else self.pixels(x)

    def encode(self, x: torch.Tensor, multiple: int = 1) -> torch.Tensor:
        """Compute the dense map (B, D, h, w) of framework-normalized images (B, 3, H, W).

        Args:
            x: images of any size.
            multiple: images are zero-padded at the bottom and right, after normalization, to a multiple of this number
                of pixels.
        """
        x = self.convert(x)
        return self.encoder(F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple)))


class FeatureShapes(dict):
    """Shapes of feature maps by name. Heads that ask for a map that is not there get an error that names the keys."""

    def __missing__(self, name: str) -> ShapeSpec:
        raise ValueError(
            f"the backbone has no feature map {name!r}, only {', '.join(self)}: add it to MODEL.SPAR.OUT_FEATURES, or "
            f"change IN_FEATURES of the heads (and of MODEL.FPN); maps other than {DENSE!r} need MODEL.BACKBONE.NAME "
            "SPARPyramid"
        )


def _check_outputs(names: Sequence[str]) -> list[str]:
    allowed = (DENSE, CLIP_DENSE)
    if isinstance(names, str) or not names or any(name not in allowed for name in names):
        raise ValueError(
            f"MODEL.SPAR.OUT_FEATURES of SPARViT must be a list out of {', '.join(allowed)}; got {names!r}. "
            "use MODEL.BACKBONE.NAME SPARPyramid for levels of other strides"
        )
    return list(dict.fromkeys(names))


def _log_trainable(encoder: DenseEncoder, spec: EncoderSpec | None, trainable: str, names: list[str]) -> None:
    logger.info(
        "Encoder %s (%s): %d of %d parameters trainable (%s: %d tensors)%s",
        spec.name if spec else type(encoder).__name__,
        (spec.pretrained or "random weights") if spec else "as given",
        *parameter_counts(encoder),
        trainable,
        len(names),
        "".join(f"\n  {name}" for name in names),
    )
