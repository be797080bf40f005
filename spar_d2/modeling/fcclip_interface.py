"""What frameworks that compare features with words ask of a backbone: FC-CLIP (arXiv:2308.02487) and its kin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spar_d2.encoders import DenseEncoder, EncoderSpec, TextTower
from spar_d2.encoders.registry import build_text, check_has_text

# FC-CLIP pools masks over "clip_vis_dense" for models with this word in their name, and refuses models whose names have
# none of the words that it knows.
_POOLED_LIKE = "convnext"
# FC-CLIP's own key for the width of the vectors.
WIDTH_KEY = "MODEL.FC_CLIP.EMBED_DIM"
_UNKNOWN = (
    "this backbone was given an encoder, not what to build it from, so its text tower is not known: "
    "give it an EncoderSpec"
)


class TextSide:
    """The text tower of an encoder, built when it is first asked for.

    It is no module, so that the tower is none of a backbone's: it is in no checkpoint, optimizer or parameter count.

    Args:
        spec: what the encoder was built from; None where that is not known.
        encoder: the encoder.
    """

    def __init__(self, spec: EncoderSpec | None, encoder: DenseEncoder) -> None:
        self.spec, self.encoder = spec, encoder
        self._tower: TextTower | None = None

    @property
    def name(self) -> str:
        return self.spec.name if self.spec else type(self.encoder).__name__

    def tower(self) -> TextTower:
        """The text tower.

        Raises:
            ValueError: the encoder has no text side, or it is not known which.
        """
        if self.spec is None:
            raise ValueError(_UNKNOWN)
        if self._tower is None:
            self._tower = build_text(self.spec)
        return self._tower

    @property
    def missing(self) -> str:
        """Why there is no text tower; "" where there is one. Builds none."""
        if self.spec is None:
            return _UNKNOWN
        try:
            check_has_text(self.spec.name)
        except ValueError as error:
            return str(error)
        return ""

    def __getstate__(self) -> dict:
        # It is built again where it is asked for; those of other libraries cannot all be pickled.
        return {**vars(self), "_tower": None}


class _ClipModel:
    """What FC-CLIP reads of a CLIP model; the text tower is only built when it does."""

    def __init__(self, text_side: TextSide) -> None:
        self._text_side = text_side

    @property
    def logit_scale(self) -> torch.Tensor:
        encoder = self._text_side.encoder
        learned = getattr(self._text_side.tower().model, "logit_scale", None)
        scale = torch.tensor(math.log(encoder.logit_scale)) if learned is None else learned.detach()
        return scale.float().to(next(encoder.parameters()).device)


class TextHooks:
    """Mixed into backbones, which set ``text_side``."""

    text_side: TextSide

    @property
    def dim_latent(self) -> int:
        """Channels of the space that dense features and the vectors of words share."""
        return self.text_side.encoder.embed_dim

    @property
    def model_name(self) -> str:
        """Name of the model, with the word by which FC-CLIP pools masks over dense features."""
        return f"{self.text_side.name} (masks pooled as for {_POOLED_LIKE})"

    def __getattr__(self, name: str):
        # No property: what one raises, a module would replace by words of its own.
        if name == "clip_model" and "text_side" in vars(self):
            return self._clip_model()
        return super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue]  # of nn.Module, beside it

    def _clip_model(self) -> _ClipModel:
        """Has ``logit_scale``, a number as a tensor: the logarithm of the factor on cosines that the model learned.

        Raises:
            AttributeError: the encoder has no text side.
        """
        if missing := self.text_side.missing:
            raise AttributeError(missing)
        return _ClipModel(self.text_side)

    def get_text_classifier(self, text_list: Sequence[str], device: torch.device | str) -> torch.Tensor:
        """Vectors of texts, which are read as they are: sentences around words are the caller's business.

        Args:
            text_list: n texts.
            device: where they are encoded.

        Returns:
            (n, D) float32, not normalized, without gradient.

        Raises:
            ValueError: the model has no text side, or ``text_list`` is no list of texts.
        """
        if isinstance(text_list, str) or not text_list or not all(isinstance(text, str) for text in text_list):
            raise ValueError(f"text_list must be a list of at least one text, got {text_list!r}")
        return self.text_side.tower().to(device).encode(list(text_list))

    def visual_prediction_forward(self, x: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Dense features that a framework pooled over masks, to vectors to compare with words.

        Args:
            x: (B, Q, D) pooled features, which are in that space already, or a map (B, D, h, w).
            masks: (B, Q, h, w) logits, for a map: it is averaged where they are above 0, over nothing to zeros.

        Returns:
            (B, Q, D).

        Raises:
            ValueError: other channels than the encoder's.
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
