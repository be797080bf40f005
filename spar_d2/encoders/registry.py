"""Families of encoders, and how a model name finds its family.

Adding a family is one file that builds it and one ``register_family`` call; every test of encoders then covers it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.text_tower import TextTower


@dataclass(frozen=True)
class EncoderFamily:
    """How one family of models is recognised and built.

    Attributes:
        name: short name of the family.
        claims: whether a model name, or a path to a model config, is of this family.
        names: all model names of this family that can be typed.
        build: (name, pretrained, reference_compat) to the dense encoder.
        build_text: (name, pretrained) to the text tower that belongs to it; None where the family has none.
        example: a tiny encoder with random weights, for tests.
    """

    name: str
    claims: Callable[[str], bool]
    names: Callable[[], list[str]]
    build: Callable[[str, str, bool], DenseEncoder]
    build_text: Callable[[str, str], TextTower] | None
    example: Callable[[], DenseEncoder]


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
    for family in FAMILIES.values():
        if family.claims(name):
            return family
    known = [candidate for family in FAMILIES.values() for candidate in family.names()]
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}?" if near else f"known are, for example, {', '.join(known[:4])}."
    raise ValueError(
        f"MODEL.SPAR.ENCODER: there is no encoder for {name!r}; {hint} "
        "A path to an open_clip model config (*.json) is allowed too."
    )


def build_encoder(name: str, pretrained: str = "", reference_compat: bool = False) -> DenseEncoder:
    """Build a dense image encoder.

    Args:
        name: a model name ("ViT-B-16") or an open_clip model config file (*.json).
        pretrained: a tag that open_clip knows for the model, a weight file, or "" for random weights. Random weights
            come from a fixed seed, so that student, teacher and text tower agree and training can be resumed.
        reference_compat: reproduce the authors' code at sizes where it differs, see :class:`DenseEncoder`.

    Returns:
        The encoder on the CPU, in eval mode, with all parameters trainable.

    Raises:
        ValueError: unknown model name or tag, or a model that has no dense features.
        FileNotFoundError: a file that is not there.
        RuntimeError: a damaged file, weights of another model, or a download that failed.
    """
    return find_family(name).build(name, pretrained, reference_compat).eval()


def build_text_tower(name: str, pretrained: str = "") -> TextTower:
    """Build the text tower that belongs to :func:`build_encoder` of the same arguments; raises alike.

    Raises:
        ValueError: moreover, where the family has no text side; says which have.
    """
    family = find_family(name)
    if family.build_text is None:
        having = ", ".join(other.name for other in FAMILIES.values() if other.build_text)
        raise ValueError(f"MODEL.SPAR.ENCODER: {name!r} ({family.name}) has no text side; families with one: {having}")
    return family.build_text(name, pretrained)
