"""Registry of encoder families, and functions that build encoders by model name.

To add a family, implement :class:`EncoderFamily` in a new file and call :func:`register_family`. The encoder tests then
cover the new family automatically.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.folders import model_folder
from spar_d2.encoders.origin import Conventions, Triple
from spar_d2.encoders.refusals import refusal
from spar_d2.encoders.settling import origin_of, pixel_statistics, settled
from spar_d2.encoders.text_tower import TextTower

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class EncoderSpec:
    """Specification of an encoder and its text tower; see :func:`build_encoder` for the fields.

    The name of a model folder is replaced by its model, and its weights and read-out are filled in where they are "".
    """

    name: str
    pretrained: str = ""
    reference_compat: bool = False
    dinov3_repo: str = ""
    dinov3_backbone: str = ""
    dinov3_tokens: str = "backbone"
    pixel_mean: Sequence[float] | None = None
    pixel_std: Sequence[float] | None = None
    quick_gelu: bool | None = None
    pretrained_part: str = ""
    readout: str = ""

    def __post_init__(self) -> None:
        if folder := model_folder(self.name):
            object.__setattr__(self, "name", folder.name)
            object.__setattr__(self, "pretrained", self.pretrained or folder.pretrained)
            object.__setattr__(self, "readout", self.readout or folder.readout)
        # Specs are keys of caches, so they must be hashable.
        for name in ("pixel_mean", "pixel_std"):
            if isinstance(value := getattr(self, name), (list, np.ndarray)):
                object.__setattr__(self, name, tuple(np.asarray(value).tolist()))


@dataclass(frozen=True)
class EncoderInfo:
    """Properties of a model that are known without building it.

    Attributes:
        family: name of the encoder family.
        native_size: pre-training image size: side of the square images in pixels, rounded down to whole patches.
        patch_size: side of a patch in pixels.
        pixel_mean, pixel_std: pixel mean and standard deviation (RGB, pixels in 0..1), three floats each.
        logit_scale: scale of the cosine similarities between dense features and text embeddings.
        quick_gelu: whether the activation is QuickGELU; None if the family has a fixed activation.
    """

    family: str
    native_size: int
    patch_size: int
    pixel_mean: Triple
    pixel_std: Triple
    logit_scale: float = DenseEncoder.logit_scale
    quick_gelu: bool | None = None


class EncoderFamily(ABC):
    """A family of models: recognizes model names, builds encoders, and reads weight files.

    Attributes:
        name: short name of the family.
        marks: state dict keys that distinguish the weight files of the family from those of other families.
        toy: a tiny model for tests and tutorials: model name, or model config file in the folder ``configs``.
        absent: state dict keys that weight files of the family never have.
        has_text: whether the models have a text tower.
        file_format: default format of weight files, see :mod:`spar_d2.encoders.convert`.
        timm_prefix: key prefix of the image trunk if it is a timm model, else "".
        readouts: allowed values of ``EncoderSpec.readout`` other than "".
    """

    name: str
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    toy: str = ""
    has_text: bool = True
    file_format: str = "open_clip"
    timm_prefix: str = ""
    readouts: tuple[str, ...] = ()

    @abstractmethod
    def claims(self, name: str) -> bool:
        """Return whether a model name or model config file belongs to this family."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return all model names of this family; model config files are not included."""

    @abstractmethod
    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        """Return pre-training image size and patch size of a model in pixels, without building it."""

    @abstractmethod
    def conventions(self, spec: EncoderSpec) -> Conventions:
        """Return the pixel statistics and activation of a pretrained tag, or else the defaults of the model."""

    @abstractmethod
    def build(self, spec: EncoderSpec) -> DenseEncoder:
        """Build the dense encoder and load its weights."""

    def build_text(self, spec: EncoderSpec) -> TextTower:
        """Build the text tower of the encoder; only called if ``has_text`` is True."""
        raise NotImplementedError(f"{self.name} has no text tower")

    def tags(self, name: str) -> list[str]:
        """Return the pretrained tags of a model."""
        return []

    def example(self) -> DenseEncoder | None:
        """Build a tiny encoder with random weights for tests, or return None if it needs other packages."""
        return None

    def from_file(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Convert the keys of any weight file of the family to the keys of encoder and text tower."""
        return dict(tensors)


FAMILIES: dict[str, EncoderFamily] = {}


def register_family(family: EncoderFamily) -> None:
    """Register a family. Raises ``ValueError`` if its name is already registered."""
    if family.name in FAMILIES:
        raise ValueError(f"encoder family {family.name!r} is already registered")
    FAMILIES[family.name] = family


def find_family(name: str) -> EncoderFamily:
    """Return the family of a model name.

    Raises:
        ValueError: the name is unknown or its model is not supported; the message suggests similar names or says why.
    """
    if not isinstance(name, str):
        raise ValueError(f"MODEL.SPAR.ENCODER must be a string, got {name!r}")
    if folder := model_folder(name):
        name = folder.name
    for family in FAMILIES.values():
        if family.claims(name):
            return family
    if reason := refusal(name):
        raise ValueError(f"MODEL.SPAR.ENCODER: {name!r} is not supported: {reason}")
    known = [candidate for family in FAMILIES.values() for candidate in family.names()]
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)]
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"examples of known names: {', '.join(f.names()[0] for f in FAMILIES.values())}."
    )
    raise ValueError(
        f"MODEL.SPAR.ENCODER: unknown encoder {name!r}; {hint} Families: {', '.join(FAMILIES)}. "
        "The path of an open_clip model config (*.json) is also allowed."
    )


def nearest_family(tensors: Tensors) -> EncoderFamily | None:
    """Return the family whose weight files have the most similar keys, or None."""

    def score(family: EncoderFamily) -> float:
        keys = family.from_file(tensors).keys()
        return sum(mark in keys for mark in family.marks) / len(family.marks) if keys.isdisjoint(family.absent) else 0

    best = max(FAMILIES.values(), key=score)
    return best if score(best) else None


def build_encoder(
    name: str,
    pretrained: str = "",
    reference_compat: bool = False,
    dinov3_repo: str = "",
    dinov3_backbone: str = "",
    dinov3_tokens: str = "backbone",
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    quick_gelu: bool | None = None,
    pretrained_part: str = "",
    readout: str = "",
) -> DenseEncoder:
    """Build a dense image encoder.

    Args:
        name: model name ("ViT-B-16", "ViT-B-16-SigLIP2-512", "vit_base_patch16_dinov3", ...), open_clip model config
            file (*.json), or a model folder of ``spar-d2 export folder`` or open_clip.
        pretrained: pretrained tag of the model's library, weight file, or "" for the weights of a model folder, else
            random weights. Random weights have a fixed seed, so that student, teacher and text tower match and training
            can be resumed.
        reference_compat: reproduce the reference code of the SPAR authors at image sizes that are not a multiple of the
            patch size, see the encoder classes.
        dinov3_repo: for DINOv3.txt: folder of a clone of the dinov3 repository; code from this folder is executed.
        dinov3_backbone: for DINOv3.txt: backbone weights, if ``pretrained`` does not contain them.
        dinov3_tokens: for DINOv3.txt: "backbone" (patch tokens of the backbone, as used by the SPAR authors) or "head"
            (patch tokens of the vision head).
        pixel_mean, pixel_std: pixel mean and standard deviation (RGB, pixels in 0..1) that the weights were trained
            with, three floats each; None uses the metadata of the weight file, or else the defaults of tag or model.
        quick_gelu: whether the activation is QuickGELU (open_clip ViTs only); None as for ``pixel_mean``.
        pretrained_part: which weights to load from a file that holds several sets ("ema", "teacher", ...).
        readout: "" for the default of the family; "self_correlation" lets patches attend to patches with similar
            outputs in the last block (not for DINOv3.txt). For timm's encoders without a text tower, also "tokens"
            (default) for the patch tokens after the final norm, or "value" for the value path of the last block.

    Returns:
        The encoder on the CPU, in eval mode, with all parameters trainable.

    Raises:
        ValueError: an argument is invalid, or the model is unknown or does not support dense features.
        FileNotFoundError: a file or folder does not exist, or the tag is unknown.
        RuntimeError: a weight file is corrupt or does not fit the model, or a download failed.
    """
    return build(
        EncoderSpec(
            name=name,
            pretrained=pretrained,
            reference_compat=reference_compat,
            dinov3_repo=dinov3_repo,
            dinov3_backbone=dinov3_backbone,
            dinov3_tokens=dinov3_tokens,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            quick_gelu=quick_gelu,
            pretrained_part=pretrained_part,
            readout=readout,
        )
    )


def build(spec: EncoderSpec) -> DenseEncoder:
    """Build an encoder from its specification, see :func:`build_encoder`."""
    family = find_family(spec.name)
    if spec.readout not in ("", *family.readouts):
        allowed = ", ".join(family.readouts) or 'empty ("")'
        raise ValueError(
            f"readout (MODEL.SPAR.READOUT) must be {allowed} for {spec.name} ({family.name}); got {spec.readout!r}"
        )
    spec = settled(spec, family)
    encoder = family.build(spec).eval()
    encoder.pixel_mean, encoder.pixel_std = pixel_statistics(spec)
    encoder.origin = origin_of(spec)
    return encoder


def describe_encoder(name: str, pretrained: str = "") -> EncoderInfo:
    """Describe a model without building it; see :func:`build_encoder` for arguments and errors."""
    spec = EncoderSpec(name, pretrained)
    family = find_family(spec.name)
    spec = settled(spec, family)
    return EncoderInfo(family.name, *family.sizes(spec), *pixel_statistics(spec), quick_gelu=spec.quick_gelu)


def build_text_tower(name: str, pretrained: str = "", dinov3_repo: str = "") -> TextTower:
    """Build the text tower of an encoder; see :func:`build_encoder` for arguments and errors.

    Raises:
        ValueError: the family of the model has no text tower; the message lists families that have one.
    """
    return build_text(EncoderSpec(name, pretrained, dinov3_repo=dinov3_repo))


def build_text(spec: EncoderSpec) -> TextTower:
    """Build a text tower from a specification, see :func:`build_text_tower`."""
    check_has_text(spec.name)
    family = find_family(spec.name)
    return family.build_text(settled(spec, family))


def check_has_text(name: str) -> None:
    """Raise ``ValueError`` if a model has no text tower; the message lists families that have one."""
    family = find_family(name)
    if not family.has_text:
        alternatives = [
            f"{other.name} ({', '.join(other.names()[:2])}, ...)" for other in FAMILIES.values() if other.has_text
        ]
        raise ValueError(
            f"MODEL.SPAR.ENCODER: {name!r} ({family.name}) has no text tower, so it cannot segment by class names; "
            f"families with a text tower: {'; '.join(alternatives)}"
        )
