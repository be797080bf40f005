"""Builds open_clip models and loads their weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.fit import check_fit
from spar_d2.encoders.messages import KEY, first_line
from spar_d2.encoders.model_configs import known_name, model_config, model_names, tags_of
from spar_d2.encoders.registry import EncoderFamily, EncoderSpec
from spar_d2.encoders.self_correlation import SELF_CORRELATION
from spar_d2.encoders.text_tower import TextTower
from spar_d2.encoders.weights import (
    OPTIONAL_KEYS,
    failed_download,
    fixed_random_weights,
    no_such_weights,
    read_state_dict,
)

# Replaces the text tower if only the image tower is needed: SigLIP text towers have 280 million parameters.
_SMALL_TEXT = {"context_length": 2, "vocab_size": 2, "width": 64, "heads": 1, "layers": 1}


class OpenCLIPModelFamily(EncoderFamily):
    """A family of open_clip models.

    Attributes:
        encoder_class: class of the encoders, built from the image tower, ``reference_compat`` and ``readout``.
    """

    encoder_class: Callable[[nn.Module, bool, str], DenseEncoder]
    readouts = (SELF_CORRELATION,)

    @staticmethod
    @abstractmethod
    def accepts(config: dict | None) -> bool:
        """Return whether an open_clip config describes a model of the family; None stands for an unknown name."""

    def claims(self, name: str) -> bool:
        return self.accepts(model_config(name))

    def names(self) -> list[str]:
        return model_names(self.accepts)

    def tags(self, name: str) -> list[str]:
        return tags_of(name)

    def build(self, spec: EncoderSpec) -> DenseEncoder:
        return self.encoder_class(build_image_tower(spec, self), spec.reference_compat, spec.readout)

    def build_text(self, spec: EncoderSpec) -> TextTower:
        return build_text(spec, self)


def build_image_tower(spec: EncoderSpec, family: EncoderFamily) -> nn.Module:
    """Build the image tower (``model.visual``) of an open_clip model and load its weights.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: see :func:`spar_d2.encoders.build_encoder`.
    """
    return _create(spec, family, part="visual").visual


def build_text(spec: EncoderSpec, family: EncoderFamily) -> TextTower:
    """Build tokenizer and text tower of an open_clip model. Raises the same errors as :func:`build_image_tower`."""
    model = _create(spec, family, part="text")
    model.visual = nn.Identity()
    # The tokenizer is loaded on first use: weight conversion does not need it, and it may require a download.
    return TextTower(model, functools.partial(_tokenize, known_name(spec.name)))


def _tokenize(name: str, texts: list[str]) -> torch.Tensor:
    return _tokenizer(name)(texts)


@functools.cache
def _tokenizer(name: str) -> Callable[[list[str]], torch.Tensor]:
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # the Hugging Face Hub client and tokenizer may raise anything
        raise RuntimeError(
            f"MODEL.SPAR.ENCODER: the tokenizer of {name} failed to download ({first_line(error)}); without network "
            "access, set text_cfg.hf_tokenizer_name to a local folder in an open_clip model config (*.json)"
        ) from error


def _create(spec: EncoderSpec, family: EncoderFamily, part: str) -> Any:
    """Build an open_clip model and load the weights of one tower.

    Args:
        spec: specification of the encoder.
        family: family of the encoder.
        part: "visual" or "text"; the other tower may have random weights.
    """
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
    expected = {k: tensor for k, tensor in model.state_dict().items() if k.startswith("visual.") == (part == "visual")}
    if part == "text" and not (expected.keys() - OPTIONAL_KEYS) & tensors.keys():
        raise RuntimeError(
            f"{KEY}: {pretrained} has no text tower (missing keys: {', '.join(sorted(expected)[:3])}, ...); "
            "use a file or tag with a text tower, or add one with spar-d2 convert --text"
        )
    known = _keys(name) if part == "visual" else model.state_dict()
    known_keys = [*(tensors if known is None else known), *expected]
    check_fit(expected, tensors, set(expected) - OPTIONAL_KEYS, pretrained, known=known_keys)
    model.load_state_dict({key: tensors[key] for key in expected if key in tensors}, strict=False)
    return model


def _create_random(name: str, part: str, activation: dict) -> nn.Module:
    options = {**activation, **({"text_cfg": _SMALL_TEXT} if part == "visual" else {})}
    with _without_open_clip_warnings(), fixed_random_weights():
        try:
            return open_clip.create_model(name, load_weights=False, pretrained_text=False, **options)
        except Exception as error:  # invalid configs may raise anything, and some text towers need a download
            raise ValueError(
                f"MODEL.SPAR.ENCODER: open_clip cannot build the model {name!r} ({first_line(error)}); "
                "check its config, and whether its text tower requires a download"
            ) from error


def _keys(name: str) -> list[str] | None:
    """Return all state dict keys of a model with both towers, or None if building it requires a download."""
    try:
        with _without_open_clip_warnings(), torch.device("meta"):
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    except Exception:  # some text towers download their config
        return None
    return list(model.state_dict())


def _download(name: str, tag: str, activation: dict) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # open_clip compares the tag with the model config, and ignores the explicit quick_gelu option.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            return open_clip.create_model(name, pretrained=tag, **activation)
    except Exception as error:  # the Hugging Face Hub client may raise anything
        raise failed_download(name, tag, error) from error


@contextlib.contextmanager
def _without_open_clip_warnings() -> Iterator[None]:
    # open_clip warns about missing weights, although they are loaded later or intentionally random.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
