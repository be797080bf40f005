"""Resolves input normalization and activation of a model from the spec, the weight file, the tag or the model name."""

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
    """Fill in the pixel statistics and activation of a spec.

    The values come from the spec, else the metadata of the weight file, else the tag, else the model name. If the tags
    of the model differ and the weight file has no metadata, a warning is logged once.

    Raises:
        ValueError: a value in the spec is invalid.
    """
    given = _checked(spec)
    defaults = family.conventions(spec)
    if given["quick_gelu"] is not None and defaults.quick_gelu is None:
        raise ValueError(
            f"{_KEYS['quick_gelu']} applies to open_clip ViTs only; the activation of {spec.name} is fixed"
        )
    tags = family.tags(spec.name)
    origin = None if spec.pretrained in tags else read_origin(spec.pretrained)
    resolved = {}
    for name in FIELDS:
        from_file = getattr(origin, name, None) if getattr(defaults, name) is not None else None
        options = (given[name], from_file, getattr(defaults, name))
        resolved[name] = next((option for option in options if option is not None), None)
    if guessed := guesses(spec, family):
        _warn(spec, family, guessed)
    return dataclasses.replace(spec, **resolved)


def pixel_statistics(spec: EncoderSpec) -> tuple[Triple, Triple]:
    """Return pixel mean and standard deviation of a resolved spec."""
    return cast(Triple, spec.pixel_mean), cast(Triple, spec.pixel_std)


def origin_of(spec: EncoderSpec) -> Origin:
    """Return the origin of the weights of a resolved spec; files are recorded without their folder."""
    stored = read_origin(spec.pretrained)
    pretrained = stored.pretrained if stored else Path(spec.pretrained).name
    name = Path(spec.name).name if spec.name.endswith(".json") else spec.name
    own = {"encoder": name, "pretrained": pretrained, "quick_gelu": spec.quick_gelu}
    own |= dict(zip(("pixel_mean", "pixel_std"), pixel_statistics(spec)))
    return dataclasses.replace(stored or Origin(), **own, version="", date="")


def _checked(spec: EncoderSpec) -> dict:
    """Return the validated values that the spec itself sets."""
    checks = (check_triple, functools.partial(check_triple, above=0), check_flag)
    values = {name: getattr(spec, name) for name in FIELDS}
    pairs = zip(values.items(), checks)
    return {name: None if value is None else check(value, _KEYS[name]) for (name, value), check in pairs}


def guesses(spec: EncoderSpec, family: EncoderFamily) -> tuple[str, ...]:
    """Return the ``FIELDS`` that are unset in spec and weight file, and that differ between the tags of the model."""
    tags = family.tags(spec.name)
    if spec.pretrained in tags or not os.path.isfile(spec.pretrained):
        return ()
    origin, defaults = read_origin(spec.pretrained), family.conventions(spec)
    unset = [name for name in FIELDS if getattr(spec, name) is None and getattr(origin, name, None) is None]
    others = [family.conventions(dataclasses.replace(spec, pretrained=tag)) for tag in tags]
    return tuple(name for name in unset if any(getattr(o, name) != getattr(defaults, name) for o in others))


@functools.lru_cache(maxsize=256)
def _warn(spec: EncoderSpec, family: EncoderFamily, names: tuple[str, ...]) -> None:
    tags, defaults = family.tags(spec.name), family.conventions(spec)
    others: dict[str, list[str]] = {}
    for tag in tags:
        expected = family.conventions(dataclasses.replace(spec, pretrained=tag))
        if differs := [f"{n} {getattr(expected, n)}" for n in names if getattr(expected, n) != getattr(defaults, n)]:
            others.setdefault(", ".join(differs), []).append(tag)
    hints = [tag for tag in tags if tag.lower() in Path(spec.pretrained).name.lower()]
    logger.warning(
        "%s has no metadata on pixel statistics and activation, and these differ between weights of %s. Using %s; "
        "%s%s. Set %s if this is wrong",
        spec.pretrained,
        spec.name,
        ", ".join(f"{name} {getattr(defaults, name)}" for name in names),
        "; ".join(f"{', '.join(tagged)} would be {expected}" for expected, tagged in others.items()),
        f". The file name suggests {', '.join(hints)}" if hints else "",
        ", ".join(f"MODEL.SPAR.{name.upper()}" for name in names),
    )
