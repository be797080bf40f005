"""Conversion of weights between the formats of open_clip, timm, the dinov3 repository, and the SPAR authors."""

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
    """Return the output formats of a family, starting with the default.

    "open_clip" and "dinov3" contain the full model with image and text tower. "authors" contains the same for the code
    of the SPAR authors. "timm" contains only the image trunk.
    """
    formats = [family.file_format]
    if family.has_text:
        formats.append("authors")
    if family.timm_prefix and "timm" not in formats:
        formats.append("timm")
    return formats


def as_format(tensors: Tensors, family: EncoderFamily, to: str) -> dict[str, torch.Tensor]:
    """Convert the keys of encoder and text tower to one of the formats of :func:`formats_of`."""
    if to == "timm":
        trunk = {name: tensor for name, tensor in tensors.items() if name.startswith(family.timm_prefix)}
        return {name.removeprefix(family.timm_prefix): tensor for name, tensor in trunk.items()}
    return {f"model.{name}": tensor for name, tensor in tensors.items()} if to == "authors" else dict(tensors)


def convert_weights(spec: EncoderSpec, to: str = "", text: str = "") -> dict[str, torch.Tensor]:
    """Convert the weights of an encoder to an output format.

    Args:
        spec: specification of the model; ``pretrained`` is the file to convert, in any supported format.
        to: output format, one of :func:`formats_of`; "" is the default of the family.
        text: tag or file with the text tower, if the output format requires one and the input has none.

    Raises:
        ValueError: the family does not support the format, or the required text tower is missing.
        FileNotFoundError, RuntimeError: see :func:`spar_d2.encoders.build_encoder`.
    """
    family = find_family(spec.name)
    allowed = formats_of(family)
    to = to or allowed[0]
    if to not in allowed:
        raise ValueError(f"--to must be one of {', '.join(allowed)} for {spec.name} ({family.name}); got {to!r}")
    if text and not (family.has_text and to != "timm"):
        raise ValueError(f"--text: weights of {spec.name} in the format {to} have no text tower; remove --text")
    image_weights = build(spec).state_dict()
    text_weights = {} if to == "timm" else _text_weights(spec, text, set(image_weights))
    return as_format({**text_weights, **image_weights}, family, to)


def _text_weights(spec: EncoderSpec, text: str, image_keys: set[str]) -> dict[str, torch.Tensor]:
    tensors = find_family(spec.name).from_file(read_state_dict(spec.pretrained, part=spec.pretrained_part))
    if not tensors.keys() - image_keys - OPTIONAL_KEYS:
        if not text:
            raise ValueError(
                f"{spec.pretrained} has no text tower: use --text with a tag or file of the pre-trained {spec.name}"
            )
        spec = dataclasses.replace(spec, pretrained=text, pretrained_part="")
    return dict(build_text(spec).model.state_dict())


def known_origin(spec: EncoderSpec) -> Origin | None:
    """Return the origin of the weights, without values that are only guessed.

    Values are guessed if the tags of the model differ and neither the file nor the spec sets them. Writing guessed
    values into a file would make them look certain.
    """
    family = find_family(spec.name)
    origin, guessed = origin_of(settled(spec, family)), guesses(spec, family)
    return dataclasses.replace(origin, **dict.fromkeys(guessed))


def write_weights(tensors: dict[str, torch.Tensor], path: str | os.PathLike, origin: Origin | None = None) -> None:
    """Atomically write weights to a safetensors file, or with ``torch.save`` to a .pt or .pth file.

    Args:
        tensors: weights.
        path: output file.
        origin: metadata to store in the file.

    Raises:
        ValueError: the suffix is not supported.
    """
    check_suffix(path)
    if Path(path).suffix == ".safetensors":
        write_safetensors(tensors, path, origin)
        return
    with atomic_write(path) as temporary:
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        add_origin(temporary, origin)


def check_suffix(path: str | os.PathLike, to: str = "") -> None:
    """Raise ``ValueError`` if ``path`` is not a valid output file for the format ``to``."""
    if Path(path).is_dir():
        raise ValueError(f"--output must be a file, {path} is a folder")
    allowed = _SUFFIXES[1:] if to == "authors" else _SUFFIXES
    if Path(path).suffix not in allowed:
        raise ValueError(f"--output must end in one of {', '.join(allowed)}; got {path}")
