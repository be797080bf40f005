"""Settings of a model for single images: validation, file signatures, and loading. Does not need Detectron2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from spar_d2.encoders import EncoderSpec
from spar_d2.encoders.precision import AUTO, PRECISIONS, resolve_precision
from spar_d2.encoders.registry import build
from spar_d2.encoders.weight_files import files_of
from spar_d2.modeling.image_segmentor import ImageSegmentor
from spar_d2.modeling.words import text_embeddings
from spar_d2.refine import load_anyup

if TYPE_CHECKING:
    from spar_d2.encoders.origin import Triple


@dataclass(frozen=True)
class ModelSettings:
    """Validated settings of a model, which identify it in a cache."""

    spec: EncoderSpec
    templates: str
    device: str
    precision: str
    anyup: str

    @classmethod
    def of(
        cls,
        encoder: object,
        pretrained: object,
        templates: object,
        device: str | torch.device | None,
        dinov3_repo: object,
        dinov3_backbone: object,
        precision: str,
        pixel_mean: Sequence[float] | None,
        pixel_std: Sequence[float] | None,
        quick_gelu: bool | None,
        pretrained_part: object,
        anyup: object,
    ) -> ModelSettings:
        """Validate the arguments of a :class:`spar_d2.predict.Predictor`, which are named in error messages."""
        spec = EncoderSpec(
            as_text("encoder", encoder),
            as_text("pretrained", pretrained),
            dinov3_repo=as_text("dinov3_repo", dinov3_repo),
            dinov3_backbone=as_text("dinov3_backbone", dinov3_backbone),
            # build() validates these sequences.
            pixel_mean=cast("Triple | None", pixel_mean),
            pixel_std=cast("Triple | None", pixel_std),
            quick_gelu=quick_gelu,
            pretrained_part=as_text("pretrained_part", pretrained_part),
        )
        if precision not in (*PRECISIONS, AUTO):
            raise ValueError(f"precision must be one of {', '.join((*PRECISIONS, AUTO))}; got {precision!r}")
        name = _device(device)
        precision = resolve_precision(precision, name)
        return cls(spec, as_text("templates", templates), name, precision, as_text("anyup", anyup))

    def signatures(self) -> tuple[tuple[int, ...], ...]:
        """Return the signatures of all files, which change if a file changes."""
        names = (self.spec.name, self.spec.pretrained, self.spec.dinov3_backbone, self.templates, self.anyup)
        stats = [part.stat() for name in names if os.path.isfile(name) for part in files_of(name) if part.is_file()]
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def load(self) -> ImageSegmentor:
        """Load the model onto its device."""
        upsampling = load_anyup(self.anyup, "anyup") if self.anyup else None
        encoder = build(self.spec).to(self.device).accelerate(self.precision).freeze()
        embeddings = text_embeddings(self.spec, self.templates, "auto", self.device)
        return ImageSegmentor(encoder, embeddings, self.device, upsampling)


def as_text(name: str, value: object) -> str:
    """Return a name or path as text. Raises ``ValueError`` with the argument's name for other types."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} must be a name or a path, got {value!r}")
    return os.fspath(value)


def _device(name: str | torch.device | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.device(name))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be "cpu", "cuda", ...; got {name!r}') from error
