"""The plain backbone: one dense map."""

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
# What frameworks that compare features with words call it.
CLIP_DENSE = "clip_vis_dense"


@registered(BACKBONE_REGISTRY)
class SPARViT(TextHooks, Backbone):
    """A dense encoder as a Detectron2 backbone, with one output at the stride of the patch.

    Args:
        encoder: the image encoder, or what to build it from; only then it also has a text side.
        pixel_mean, pixel_std: what the framework normalizes with, in the order of its channels, for pixels in 0..255
            (``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD``); it is undone, and the encoder's own applied. None: the input
            is in the encoder's normalization, in RGB, already.
        input_format: order of the framework's channels, "BGR" or "RGB" (``INPUT.FORMAT``); needed with ``pixel_mean``.
        trainable: what is trained, see :func:`spar_d2.encoders.set_trainable`; None leaves the encoder as it is.
        precision, compile, checkpointing: see :meth:`spar_d2.encoders.DenseEncoder.accelerate`; None leaves all three.
        out_features: "dense", "clip_vis_dense" (the same map by FC-CLIP's name for it), or both.
        text_width: channels of the vectors of words that the framework expects (``MODEL.FC_CLIP.EMBED_DIM``); None for
            any.

    Raises:
        ValueError: an argument that is not allowed; or as :func:`spar_d2.encoders.build_encoder`.
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
            raise ValueError(f"{WIDTH_KEY} must be {self.encoder.embed_dim}, as {name} has it; got {text_width}")
        self.pixels: PixelConversion | None = None
        if pixel_mean is not None:
            if input_format is None:
                # A wrong guess would swap colors, and nothing would say so.
                raise ValueError('input_format must be "BGR" or "RGB" where pixel_mean is given (INPUT.FORMAT)')
            own = (self.encoder.pixel_mean, self.encoder.pixel_std)
            self.pixels = PixelConversion(pixel_mean, [1.0] * 3 if pixel_std is None else pixel_std, input_format, *own)
        if precision is not None:
            self.encoder.accelerate(precision, compile, checkpointing)
        if trainable is not None:
            # Decided before an optimizer looks at the model, so that it never sees frozen weights.
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
        # Heads that compare their output with labels of the padded size need whole cells.
        return self.encoder.patch_size

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self.size_divisibility}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) as the framework normalized it, any size, to {"dense": (B, D, ceil(H / p), ceil(W / p))}."""
        return dict.fromkeys(self._out_features, self.encode(x))

    def convert(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) as the framework normalized it, to RGB as the encoder takes it."""
        return x if self.pixels is None else self.pixels(x)

    def encode(self, x: torch.Tensor, multiple: int = 1) -> torch.Tensor:
        """The dense map (B, D, h, w) of (B, 3, H, W) as the framework normalized it.

        Args:
            x: images of any size.
            multiple: pad them at the right and bottom to a multiple of so many pixels, with the encoder's zero, which
                is its mean color.
        """
        x = self.convert(x)
        return self.encoder(F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple)))


def _check_outputs(names: Sequence[str]) -> list[str]:
    allowed = (DENSE, CLIP_DENSE)
    if isinstance(names, str) or not names or any(name not in allowed for name in names):
        raise ValueError(
            f"MODEL.SPAR.OUT_FEATURES of SPARViT must be a list out of {', '.join(allowed)}; got {names!r}. "
            "MODEL.BACKBONE.NAME SPARPyramid has levels of other strides"
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
