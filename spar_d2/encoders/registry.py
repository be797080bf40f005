"""Families of encoders, and how a model name finds its family.

Adding a family is one file that builds it and one ``register_family`` call; every test of encoders then covers it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.origin import Conventions, Triple
from spar_d2.encoders.settling import origin_of, settled
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
    pixel_mean: Triple | None = None
    pixel_std: Triple | None = None
    quick_gelu: bool | None = None
    pretrained_part: str = ""

    def __post_init__(self) -> None:
        # Lists of a config are no keys of dictionaries.
        for name in ("pixel_mean", "pixel_std"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))


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


def _as_they_are(tensors: Tensors) -> dict[str, torch.Tensor]:
    return dict(tensors)


@dataclass(frozen=True)
class EncoderFamily:
    """How one family of models is recognised, built, and kept in files.

    Attributes:
        name: short name of the family.
        claims: whether a model name, or a path to a model config, is of this family.
        names: all model names of this family that can be typed.
        sizes: native size and patch size of a model, without building the weights.
        conventions: what a model expects by its tag, or else by its name.
        tags: of a model's weights.
        build: the dense encoder.
        build_text: the text tower that belongs to it; None where the family has none.
        example: a tiny encoder with random weights, for tests; None where it needs what is not here.
        marks: keys of the library's model that tell its weight files from those of other families.
        from_file: brings the keys of any of the family's weight files to those of encoder and text tower.
        file_format: whose weight files the family's are usually kept in, see :mod:`spar_d2.encoders.convert`.
        timm_prefix: what the keys of the image trunk begin with where it is timm's; "" where it is not.
    """

    name: str
    claims: Callable[[str], bool]
    names: Callable[[], list[str]]
    sizes: Callable[[EncoderSpec], tuple[int, int]]
    conventions: Callable[[EncoderSpec], Conventions]
    tags: Callable[[str], list[str]]
    build: Callable[[EncoderSpec], DenseEncoder]
    build_text: Callable[[EncoderSpec], TextTower] | None
    example: Callable[[], DenseEncoder | None]
    marks: tuple[str, ...]
    from_file: Callable[[Tensors], dict[str, torch.Tensor]] = field(default=_as_they_are)
    file_format: str = "open_clip"
    timm_prefix: str = ""


FAMILIES: dict[str, EncoderFamily] = {}


def register_family(family: EncoderFamily) -> None:
    """Make a family known; raises ``ValueError`` where its name is taken."""
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
    compat = (reference_compat, dinov3_repo, dinov3_backbone, dinov3_tokens)
    return build(EncoderSpec(name, pretrained, *compat, pixel_mean, pixel_std, quick_gelu, pretrained_part))


def build(spec: EncoderSpec) -> DenseEncoder:
    """:func:`build_encoder` of a spec."""
    family = find_family(spec.name)
    spec = settled(spec, family)
    encoder = family.build(spec).eval()
    encoder.pixel_mean, encoder.pixel_std = spec.pixel_mean, spec.pixel_std
    encoder.origin = origin_of(spec)
    return encoder


def describe_encoder(name: str, pretrained: str = "") -> EncoderInfo:
    """What is known of a model without building its weights; arguments and errors as for :func:`build_encoder`."""
    family = find_family(name)
    spec = settled(EncoderSpec(name, pretrained), family)
    sizes = family.sizes(spec)
    return EncoderInfo(family.name, *sizes, spec.pixel_mean, spec.pixel_std, quick_gelu=spec.quick_gelu)


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
    if family.build_text is None:
        having = [
            f"{other.name} ({', '.join(other.names()[:2])}, ...)" for other in FAMILIES.values() if other.build_text
        ]
        raise ValueError(
            f"MODEL.SPAR.ENCODER: {name!r} ({family.name}) has no text side, so it cannot segment by words; "
            f"families with one: {'; '.join(having)}"
        )
