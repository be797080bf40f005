"""Backbone interface of frameworks that compare features with text: FC-CLIP (arXiv:2308.02487) and its variants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spar_d2.encoders import DenseEncoder, EncoderSpec, TextTower
from spar_d2.encoders.registry import build_text, check_has_text

# FC-CLIP checks model names for known substrings. With this one, it pools masks over "clip_vis_dense". Other names are
# refused.
_POOLED_LIKE = "convnext"
# FC-CLIP's key for the width of the text embeddings.
WIDTH_KEY = "MODEL.FC_CLIP.EMBED_DIM"
_UNKNOWN = (
    "this backbone was built from an encoder instance, so its text tower is not known: pass an EncoderSpec instead"
)


class TextSide:
    """The text tower of an encoder, built on first use.

    This is not an ``nn.Module``, so that the tower does not become part of the backbone's checkpoints, optimizer and
    parameter count.

    Args:
        spec: spec that the encoder was built from, or None if unknown.
        encoder: image encoder.
    """

    def __init__(self, spec: EncoderSpec | None, encoder: DenseEncoder) -> None:
        self.spec, self.encoder = spec, encoder
        self._tower: TextTower | None = None

    @property
    def name(self) -> str:
        return self.spec.name if self.spec else type(self.encoder).__name__

    def tower(self) -> TextTower:
        """Return the text tower.

        Raises:
            ValueError: the encoder has no text tower, or it is unknown.
        """
        if self.spec is None:
            raise ValueError(_UNKNOWN)
        if self._tower is None:
            self._tower = build_text(self.spec)
        return self._tower

    @property
    def missing(self) -> str:
        """Reason why there is no text tower, or "". Does not build the tower."""
        if self.spec is None:
            return _UNKNOWN
        try:
            check_has_text(self.spec.name)
        except ValueError as error:
            return str(error)
        return ""

    def __getstate__(self) -> dict:
        # The tower is rebuilt on demand: not all text towers can be pickled.
        return {**vars(self), "_tower": None}


class _ClipModel:
    """The part of a CLIP model that FC-CLIP reads. The text tower is built on first access."""

    def __init__(self, text_side: TextSide) -> None:
        self._text_side = text_side

    @property
    def logit_scale(self) -> torch.Tensor:
        encoder = self._text_side.encoder
        learned = getattr(self._text_side.tower().model, "logit_scale", None)
        scale = torch.tensor(math.log(encoder.logit_scale)) if learned is None else learned.detach()
        return scale.float().to(next(encoder.parameters()).device)


class TextHooks:
    """Mixin for backbones that set ``text_side``."""

    text_side: TextSide

    @property
    def dim_latent(self) -> int:
        """Width of the embedding space that dense features and text embeddings share."""
        return self.text_side.encoder.embed_dim

    @property
    def model_name(self) -> str:
        """Model name, with the substring that makes FC-CLIP pool masks over dense features."""
        return f"{self.text_side.name} (masks pooled as for {_POOLED_LIKE})"

    def __getattr__(self, name: str):
        # Not a property: nn.Module would hide the message of an AttributeError raised by a property.
        if name == "clip_model" and "text_side" in vars(self):
            return self._clip_model()
        return super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue]  # nn.Module's, via the subclass

    def _clip_model(self) -> _ClipModel:
        """Return an object with ``logit_scale``: a scalar tensor, the logarithm of the learned factor on cosine scores.

        Raises:
            AttributeError: the encoder has no text tower.
        """
        if missing := self.text_side.missing:
            raise AttributeError(missing)
        return _ClipModel(self.text_side)

    def get_text_classifier(self, text_list: Sequence[str], device: torch.device | str) -> torch.Tensor:
        """Encode texts as they are. Prompt templates are applied by the caller.

        Args:
            text_list: n texts.
            device: device of the text tower.

        Returns:
            (n, D) float32, not normalized, without gradient.

        Raises:
            ValueError: the model has no text tower, or ``text_list`` is not a list of strings.
        """
        if isinstance(text_list, str) or not text_list or not all(isinstance(text, str) for text in text_list):
            raise ValueError(f"text_list must be a non-empty list of strings, got {text_list!r}")
        return self.text_side.tower().to(device).encode(list(text_list))

    def visual_prediction_forward(self, x: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Convert mask-pooled dense features to embeddings that can be compared with text embeddings.

        Args:
            x: (B, Q, D) pooled features, which are already in the shared space, or a feature map (B, D, h, w).
            masks: (B, Q, h, w) mask logits, for a feature map. The map is averaged where the logits are above 0; empty
                masks give zeros.

        Returns:
            (B, Q, D).

        Raises:
            ValueError: the number of channels differs from the encoder's.
        """
        channels = x.shape[-1] if masks is None else x.shape[1]
        if channels != self.dim_latent:
            raise ValueError(
                f"pooled features must have the {self.dim_latent} channels of {self.text_side.name}, got {channels}; "
                f"{WIDTH_KEY} must be {self.dim_latent}"
            )
        if masks is None:
            return x
        inside = (masks > 0).to(x)
        return torch.einsum("bchw,bqhw->bqc", x, inside) / inside.sum((2, 3)).clamp(min=1)[..., None]
