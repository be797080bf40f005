"""Families of encoders, and how a model name finds its family.

A new family is one file with an :class:`EncoderFamily` and a ``register_family`` call; every test of encoders then
covers it.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.origin import Conventions, Triple
from spar_d2.encoders.settling import origin_of, pixel_statistics, settled
from spar_d2.encoders.text_tower import TextTower

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder and its text tower are built from; see :func:`build_encoder` for the fields."""

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

    def __post_init__(self) -> None:
        # Specs are keys of caches, which lists and arrays cannot be.
        for name in ("pixel_mean", "pixel_std"):
            if isinstance(value := getattr(self, name), (list, np.ndarray)):
                object.__setattr__(self, name, tuple(np.asarray(value).tolist()))


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of a model without building its weights.

    Attributes:
        family: name of its family.
        native_size: side of the square images that it was pre-trained on, in pixels, in whole patches.
        patch_size: side of a patch in pixels.
        pixel_mean, pixel_std: three floats each, RGB, for pixels in 0..1.
        logit_scale: factor on the cosines with the words that the method uses.
        quick_gelu: whether its activation is QuickGELU; None where its family has no choice.
    """

    family: str
    native_size: int
    patch_size: int
    pixel_mean: Triple
    pixel_std: Triple
    logit_scale: float = DenseEncoder.logit_scale
    quick_gelu: bool | None = None


class EncoderFamily(ABC):
    """One family of models: how its names are recognized, its encoders built, and its weight files read.

    Attributes:
        name: short name of the family.
        marks: keys of the library's model that distinguish its weight files from those of other families.
        has_text: whether its models have a text tower.
        file_format: library whose format its weight files usually have, see :mod:`spar_d2.encoders.convert`.
        timm_prefix: prefix of the keys of the image trunk where that is a timm model; "" where it is not.
    """

    name: str
    marks: tuple[str, ...]
    has_text: bool = True
    file_format: str = "open_clip"
    timm_prefix: str = ""

    @abstractmethod
    def claims(self, name: str) -> bool:
        """Whether a model name, or a path to a model config, belongs to this family."""

    @abstractmethod
    def names(self) -> list[str]:
        """All model names of this family, without paths to configs."""

    @abstractmethod
    def sizes(self, spec: EncoderSpec) -> tuple[int, int]:
        """Native size and patch size of a model in pixels, without building its weights."""

    @abstractmethod
    def conventions(self, spec: EncoderSpec) -> Conventions:
        """Pixel statistics and activation that a model expects by its tag, or else by its name."""

    @abstractmethod
    def build(self, spec: EncoderSpec) -> DenseEncoder:
        """The dense encoder with its weights."""

    def build_text(self, spec: EncoderSpec) -> TextTower:
        """The text tower that belongs to the encoder; only called where ``has_text``."""
        raise NotImplementedError(f"{self.name} has no text tower")

    def tags(self, name: str) -> list[str]:
        """Tags of a model's pre-trained weights."""
        return []

    def example(self) -> DenseEncoder | None:
        """A tiny encoder with random weights, for tests; None where it cannot be built from installed packages."""
        return None

    def from_file(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Rename the keys of any of the family's weight files to those of encoder and text tower."""
        return dict(tensors)


FAMILIES: dict[str, EncoderFamily] = {}


def register_family(family: EncoderFamily) -> None:
    """Register a family; raises ``ValueError`` where its name is taken."""
    if family.name in FAMILIES:
        raise ValueError(f"an encoder family {family.name!r} is registered already")
    FAMILIES[family.name] = family


def find_family(name: str) -> EncoderFamily:
    """The family of a model name.

    Raises:
        ValueError: no family claims the name; suggests near ones.
    """
    if not isinstance(name, str):
        raise ValueError(f"MODEL.SPAR.ENCODER: the name of a model is a text, got {name!r}")
    for family in FAMILIES.values():
        if family.claims(name):
            return family
    known = [candidate for family in FAMILIES.values() for candidate in family.names()]
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)]
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"known are, for example, {', '.join(f.names()[0] for f in FAMILIES.values())}."
    )
    raise ValueError(
        f"MODEL.SPAR.ENCODER: there is no encoder for {name!r}; {hint} Families: {', '.join(FAMILIES)}. "
        "A path to an open_clip model config (*.json) is allowed too."
    )


def nearest_family(tensors: Tensors) -> EncoderFamily | None:
    """The family whose weight files have keys like these, or None."""

    def score(family: EncoderFamily) -> int:
        keys = family.from_file(tensors)
        return sum(mark in keys for mark in family.marks)

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
) -> DenseEncoder:
    """Build a dense image encoder.

    Args:
        name: a model name ("ViT-B-16", "ViT-B-16-SigLIP2-512", "vit_base_patch16_dinov3", ...), or an open_clip model
            config file (*.json).
        pretrained: a tag that the model's library knows, a weight file, or "" for random weights. Random weights come
            from a fixed seed, so that student, teacher and text tower agree and training can be resumed.
        reference_compat: reproduce the authors' code at sizes where it differs, see the encoder classes.
        dinov3_repo: for DINOv3.txt, a folder with a clone of the dinov3 repository; its code is run.
        dinov3_backbone: for DINOv3.txt, weights of the backbone where ``pretrained`` holds only the rest.
        dinov3_tokens: for DINOv3.txt, "backbone" (patch tokens of the backbone, as the authors of SPAR) or "head"
            (those of the vision head on top of it).
        pixel_mean, pixel_std: three floats each, RGB, for pixels in 0..1, that the weights were trained with; None is
            what the weight file says of itself, or else what the tag or the model does.
        quick_gelu: whether the activation is QuickGELU; None as for those. Of open_clip's ViTs alone.
        pretrained_part: which weights to take of a file with several ("ema", "teacher", ...).

    Returns:
        The encoder on the CPU, in eval mode, with all parameters trainable.

    Raises:
        ValueError: unknown model name or tag, or a model that has no dense features.
        FileNotFoundError: a file or folder that is not there.
        RuntimeError: a damaged file, weights of another model, or a download that failed.
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
        )
    )


def build(spec: EncoderSpec) -> DenseEncoder:
    """:func:`build_encoder` of a spec."""
    family = find_family(spec.name)
    spec = settled(spec, family)
    encoder = family.build(spec).eval()
    encoder.pixel_mean, encoder.pixel_std = pixel_statistics(spec)
    encoder.origin = origin_of(spec)
    return encoder


def describe_encoder(name: str, pretrained: str = "") -> EncoderInfo:
    """What is known of a model without building its weights; arguments and errors as for :func:`build_encoder`."""
    family = find_family(name)
    spec = settled(EncoderSpec(name, pretrained), family)
    return EncoderInfo(family.name, *family.sizes(spec), *pixel_statistics(spec), quick_gelu=spec.quick_gelu)


def build_text_tower(name: str, pretrained: str = "", dinov3_repo: str = "") -> TextTower:
    """Build the text tower that belongs to :func:`build_encoder` of the same arguments; raises alike.

    Raises:
        ValueError: moreover, where the family has no text side; says which have.
    """
    return build_text(EncoderSpec(name, pretrained, dinov3_repo=dinov3_repo))


def build_text(spec: EncoderSpec) -> TextTower:
    """:func:`build_text_tower` of a spec."""
    check_has_text(spec.name)
    family = find_family(spec.name)
    return family.build_text(settled(spec, family))


def check_has_text(name: str) -> None:
    """Raise ``ValueError`` where a model's family has no text side; says which have."""
    family = find_family(name)
    if not family.has_text:
        having = [
            f"{other.name} ({', '.join(other.names()[:2])}, ...)" for other in FAMILIES.values() if other.has_text
        ]
        raise ValueError(
            f"MODEL.SPAR.ENCODER: {name!r} ({family.name}) has no text side, so it cannot segment by words; "
            f"families with one: {'; '.join(having)}"
        )
