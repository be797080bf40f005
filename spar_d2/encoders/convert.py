"""Formats of weight files: those of open_clip, timm, the dinov3 repository, and the authors of SPAR."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from spar_d2.encoders.origin import Origin, add_origin
from spar_d2.encoders.registry import EncoderFamily, EncoderSpec, Tensors, build, build_text, find_family
from spar_d2.encoders.settling import guesses, origin_of, settled
from spar_d2.encoders.weights import OPTIONAL_KEYS, read_state_dict, write_safetensors
from spar_d2.utils.io import atomic_write

_SUFFIXES = (".safetensors", ".pt", ".pth")


def formats_of(family: EncoderFamily) -> list[str]:
    """Formats that weights of a family can be written in, the usual one first.

    "open_clip" and "dinov3": all of the library's model, image and text; "authors": the same as the authors' code loads
    it; "timm": the image trunk alone.
    """
    formats = [family.file_format]
    if family.has_text:
        formats.append("authors")
    if family.timm_prefix and "timm" not in formats:
        formats.append("timm")
    return formats


def as_format(tensors: Tensors, family: EncoderFamily, to: str) -> dict[str, torch.Tensor]:
    """Weights under the keys of one of :func:`formats_of` the family, from those of encoder and text tower."""
    if to == "timm":
        trunk = {name: tensor for name, tensor in tensors.items() if name.startswith(family.timm_prefix)}
        return {name.removeprefix(family.timm_prefix): tensor for name, tensor in trunk.items()}
    return {f"model.{name}": tensor for name, tensor in tensors.items()} if to == "authors" else dict(tensors)


def convert_weights(spec: EncoderSpec, to: str = "", text: str = "") -> dict[str, torch.Tensor]:
    """Weights of an encoder under the keys of a file format.

    Args:
        spec: the model; ``pretrained`` is the file to convert, of any format.
        to: one of :func:`formats_of` the model's family; "" is the usual one.
        text: tag or file with the text tower, where the file to convert has none and the format wants one.

    Raises:
        ValueError: a format that the family does not have, or a text tower is wanted that is nowhere.
        FileNotFoundError, RuntimeError: as :func:`spar_d2.encoders.build_encoder`.
    """
    family = find_family(spec.name)
    allowed = formats_of(family)
    to = to or allowed[0]
    if to not in allowed:
        raise ValueError(f"--to must be one of {', '.join(allowed)} for {spec.name} ({family.name}); got {to!r}")
    if text and not (family.has_text and to != "timm"):
        raise ValueError(f"--text: weights of {spec.name} for {to} have no text tower, leave it out")
    image = build(spec).state_dict()
    words = {} if to == "timm" else _text_weights(spec, text, set(image))
    return as_format({**words, **image}, family, to)


def _text_weights(spec: EncoderSpec, text: str, image: set[str]) -> dict[str, torch.Tensor]:
    there = find_family(spec.name).from_file(read_state_dict(spec.pretrained, part=spec.pretrained_part))
    if not there.keys() - image - OPTIONAL_KEYS:
        if not text:
            raise ValueError(
                f"{spec.pretrained} has no text tower: name a tag or a file that has it with --text (that of the "
                f"pre-trained {spec.name})"
            )
        spec = dataclasses.replace(spec, pretrained=text, pretrained_part="")
    return dict(build_text(spec).model.state_dict())


def known_origin(spec: EncoderSpec) -> Origin | None:
    """Where the weights of a file are from, as far as the file, the spec or the model's name says it for sure.

    What is only a guess, as tags of the model differ in it, is left out: it would be taken for certain.
    """
    family = find_family(spec.name)
    origin, guessed = origin_of(settled(spec, family)), guesses(spec, family)
    return dataclasses.replace(origin, **dict.fromkeys(guessed))


def write_weights(tensors: dict[str, torch.Tensor], path: str | os.PathLike, origin: Origin | None = None) -> None:
    """Write a weight file that either is complete or is not there: safetensors, or ``torch.save``'s for .pt and .pth.

    Where the weights are from (``origin``) is written beside them.

    Raises:
        ValueError: another suffix.
    """
    check_suffix(path)
    if Path(path).suffix == ".safetensors":
        write_safetensors(tensors, path, origin)
        return
    with atomic_write(path) as temporary:
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        add_origin(temporary, origin)


def check_suffix(path: str | os.PathLike, to: str = "") -> None:
    """Raise ``ValueError`` unless a weight file of the format ``to`` can be written there."""
    if Path(path).is_dir():
        raise ValueError(f"--output must be a file, {path} is a folder")
    allowed = _SUFFIXES[1:] if to == "authors" else _SUFFIXES
    if Path(path).suffix not in allowed:
        raise ValueError(f"--output must end in one of {', '.join(allowed)}; got {path}")
