"""What a model expects that its weights do not tell, from all who say something of it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spar_d2.encoders.origin import Origin, Triple, check_flag, check_triple, read_origin

if TYPE_CHECKING:
    from spar_d2.encoders.registry import EncoderFamily, EncoderSpec

logger = logging.getLogger(__name__)

FIELDS = ("pixel_mean", "pixel_std", "quick_gelu")
_KEYS = {name: f"{name} (MODEL.SPAR.{name.upper()})" for name in FIELDS}


def settled(spec: EncoderSpec, family: EncoderFamily) -> EncoderSpec:
    """A spec with all that a model of the family expects: as the spec says, else its weight file, tag, or name.

    Where models of the name differ and a weight file says nothing of itself, a warning says what is taken, once.

    Raises:
        ValueError: what the spec says is not allowed.
    """
    given = _checked(spec)
    usual = family.conventions(spec)
    if given["quick_gelu"] is not None and usual.quick_gelu is None:
        raise ValueError(
            f"{_KEYS['quick_gelu']} is for open_clip's ViTs alone, {spec.name} has no choice: leave it out"
        )
    tags = family.tags(spec.name)
    origin = None if spec.pretrained in tags else read_origin(spec.pretrained)
    taken = {}
    for name in FIELDS:
        said = getattr(origin, name, None) if getattr(usual, name) is not None else None
        options = (given[name], said, getattr(usual, name))
        taken[name] = next((option for option in options if option is not None), None)
    if unsaid := guesses(spec, family):
        _warn(spec, family, unsaid)
    return dataclasses.replace(spec, **taken)


def pixel_statistics(spec: EncoderSpec) -> tuple[Triple, Triple]:
    """Pixel mean and deviation of a settled spec."""
    return cast(Triple, spec.pixel_mean), cast(Triple, spec.pixel_std)


def origin_of(spec: EncoderSpec) -> Origin:
    """Where the weights of a settled spec are from; files are named by their last part alone."""
    before = read_origin(spec.pretrained)
    pretrained = before.pretrained if before else Path(spec.pretrained).name
    name = Path(spec.name).name if spec.name.endswith(".json") else spec.name
    origin = Origin(name, pretrained, *pixel_statistics(spec), spec.quick_gelu)
    return origin if before is None else dataclasses.replace(origin, window=before.window, stride=before.stride)


def _checked(spec: EncoderSpec) -> dict:
    """What a spec says itself."""
    checks = (check_triple, functools.partial(check_triple, above=0), check_flag)
    said = {name: getattr(spec, name) for name in FIELDS}
    pairs = zip(said.items(), checks)
    return {name: None if value is None else check(value, _KEYS[name]) for (name, value), check in pairs}


def guesses(spec: EncoderSpec, family: EncoderFamily) -> tuple[str, ...]:
    """Names out of ``FIELDS`` that neither the spec nor its weight file says, and that tags of the model differ in."""
    tags = family.tags(spec.name)
    if spec.pretrained in tags or not os.path.isfile(spec.pretrained):
        return ()
    origin, usual = read_origin(spec.pretrained), family.conventions(spec)
    unsaid = [name for name in FIELDS if getattr(spec, name) is None and getattr(origin, name, None) is None]
    others = [family.conventions(dataclasses.replace(spec, pretrained=tag)) for tag in tags]
    return tuple(name for name in unsaid if any(getattr(o, name) != getattr(usual, name) for o in others))


@functools.lru_cache(maxsize=256)
def _warn(spec: EncoderSpec, family: EncoderFamily, names: tuple[str, ...]) -> None:
    tags, usual = family.tags(spec.name), family.conventions(spec)
    others: dict[str, list[str]] = {}
    for tag in tags:
        expected = family.conventions(dataclasses.replace(spec, pretrained=tag))
        if differs := [f"{n} {getattr(expected, n)}" for n in names if getattr(expected, n) != getattr(usual, n)]:
            others.setdefault(", ".join(differs), []).append(tag)
    hints = [tag for tag in tags if tag.lower() in Path(spec.pretrained).name.lower()]
    logger.warning(
        "%s does not say what images and activation it was trained with, and weights of %s differ: taken is %s; %s%s. "
        "Set %s where that is wrong",
        spec.pretrained,
        spec.name,
        ", ".join(f"{name} {getattr(usual, name)}" for name in names),
        "; ".join(f"{', '.join(named)} would be {expected}" for expected, named in others.items()),
        f". Its name suggests {', '.join(hints)}" if hints else "",
        ", ".join(f"MODEL.SPAR.{name.upper()}" for name in names),
    )
