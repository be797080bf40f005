"""Builds open_clip models with weights, for the families whose weights open_clip keeps."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from spar_d2.encoders.fit import check_fit
from spar_d2.encoders.messages import KEY, first_line
from spar_d2.encoders.model_configs import known_name, tags_of
from spar_d2.encoders.registry import EncoderFamily, EncoderSpec
from spar_d2.encoders.text_tower import TextTower
from spar_d2.encoders.weights import (
    OPTIONAL_KEYS,
    failed_download,
    fixed_random_weights,
    no_such_weights,
    read_state_dict,
)

# Takes the place of a text tower that is not asked for: those of SigLIP have 280 million parameters.
_SMALL_TEXT = {"context_length": 2, "vocab_size": 2, "width": 64, "heads": 1, "layers": 1}


def build_image_tower(spec: EncoderSpec, family: EncoderFamily) -> nn.Module:
    """``model.visual`` of an open_clip model, with weights.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as :func:`spar_d2.encoders.build_encoder`.
    """
    return _create(spec, family, part="visual").visual


def build_text(spec: EncoderSpec, family: EncoderFamily) -> TextTower:
    """Tokenizer and text tower of an open_clip model, with weights; raises like :func:`build_image_tower`."""
    model = _create(spec, family, part="text")
    model.visual = nn.Identity()
    # Weights of a text tower are also wanted where there are no texts and no way to its tokenizer.
    return TextTower(model, functools.partial(_tokenize, known_name(spec.name)))


def _tokenize(name: str, texts: list[str]) -> torch.Tensor:
    return _tokenizer(name)(texts)


@functools.cache
def _tokenizer(name: str) -> Callable[[list[str]], torch.Tensor]:
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # whatever the hub's client and the tokenizer's own library raise
        raise RuntimeError(
            f"MODEL.SPAR.ENCODER: the tokenizer of {name} could not be had ({first_line(error)}); with no way to "
            "download it, name a local folder as text_cfg.hf_tokenizer_name in an open_clip model config (*.json)"
        ) from error


def _create(spec: EncoderSpec, family: EncoderFamily, part: str) -> Any:
    """An open_clip model in which ``part``, "visual" or "text", has its weights."""
    name, pretrained = known_name(spec.name), spec.pretrained
    activation = {} if spec.quick_gelu is None else {"quick_gelu": spec.quick_gelu}
    tags = tags_of(name)
    if pretrained in tags:
        return _download(name, pretrained, activation)
    if not pretrained:
        return _create_random(name, part, activation)
    if not Path(pretrained).is_file():
        raise no_such_weights(name, pretrained, tags)
    tensors = family.from_file(read_state_dict(pretrained, part=spec.pretrained_part))
    model = _create_random(name, part, activation)
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("visual.") == (part == "visual")}
    if part == "text" and not (own.keys() - OPTIONAL_KEYS) & tensors.keys():
        raise RuntimeError(
            f"{KEY}: {pretrained} has no text tower (missing keys: {', '.join(sorted(own)[:3])}, ...); "
            "take a file or a tag that has it, or add it with tools/convert_weights.py --text"
        )
    known = _keys(name) if part == "visual" else model.state_dict()
    check_fit(own, tensors, set(own) - OPTIONAL_KEYS, pretrained, known=[*(tensors if known is None else known), *own])
    model.load_state_dict({key: tensors[key] for key in own if key in tensors}, strict=False)
    return model


def _create_random(name: str, part: str, activation: dict) -> nn.Module:
    options = {**activation, **({"text_cfg": _SMALL_TEXT} if part == "visual" else {})}
    with _without_open_clip_warnings(), fixed_random_weights():
        try:
            return open_clip.create_model(name, load_weights=False, pretrained_text=False, **options)
        except Exception as error:  # a wrong config fails anywhere; some text towers ask a hub for theirs
            raise ValueError(
                f"MODEL.SPAR.ENCODER: open_clip cannot build the model {name!r} ({first_line(error)}); "
                "check its config, and whether its text tower needs a download"
            ) from error


def _keys(name: str) -> list[str] | None:
    """All keys of a model with both towers; None where it cannot be built without a download."""
    try:
        with _without_open_clip_warnings(), torch.device("meta"):
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    except Exception:  # some text towers ask a hub for their config
        return None
    return list(model.state_dict())


def _download(name: str, tag: str, activation: dict) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # It compares the tag with the model's config, not with the activation that it is told to take.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            return open_clip.create_model(name, pretrained=tag, **activation)
    except Exception as error:  # whatever the hub's client raises: network, disk, access
        raise failed_download(name, tag, error) from error


@contextlib.contextmanager
def _without_open_clip_warnings() -> Iterator[None]:
    # It warns of missing weights that are loaded a moment later, or that the user did not want.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
