"""Builds open_clip models by name or config file, and registers the family of its own ViTs."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from torch import nn

from spar_d2.encoders.base import DenseEncoder
from spar_d2.encoders.open_clip_vit import OpenCLIPEncoder
from spar_d2.encoders.registry import EncoderFamily, register_family
from spar_d2.encoders.text_tower import TextTower
from spar_d2.encoders.weights import KEY, check_fit, first_line, read_state_dict

_RANDOM_WEIGHTS_SEED = 0


def create_clip(name: str, pretrained: str, part: str) -> nn.Module:
    """Create an open_clip model with weights.

    Args:
        name: a model name of open_clip, or a JSON model config file.
        pretrained: a tag, a weight file, or "" for random weights from a fixed seed.
        part: "visual" or "text": what a weight file must hold.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as :func:`spar_d2.encoders.build_encoder`.
    """
    name = _add_config_file(name) if name.endswith(".json") else name
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        return _download(name, pretrained)
    if pretrained and not Path(pretrained).is_file():
        near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0.4) or tags[:5]
        allowed = f"a tag of {name} ({', '.join(near)}, ...)" if tags else f"{name} has no tags"
        raise FileNotFoundError(f"{KEY}: {pretrained!r} is neither a weight file nor a known tag; {allowed}")
    model = _create_random(name)
    if pretrained:
        own, tensors = model.state_dict(), read_state_dict(pretrained)
        needed = {key for key in own if key.startswith("visual.") == (part == "visual")}
        # Without them a model still encodes; files differ in whether they have them.
        optional = {"logit_scale", "logit_bias"}
        check_fit(own, tensors, needed - optional, pretrained)
        model.load_state_dict(tensors, strict=False)
    return model


def _create_random(name: str) -> nn.Module:
    with _without_open_clip_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_WEIGHTS_SEED)
        try:
            return open_clip.create_model(name, load_weights=False, pretrained_text=False)
        except Exception as error:  # a wrong config fails anywhere; some text towers ask a hub for theirs
            raise ValueError(
                f"MODEL.SPAR.ENCODER: open_clip cannot build the model {name!r} ({first_line(error)}); "
                "check its config, and whether its text tower needs a download"
            ) from error


def _download(name: str, tag: str) -> nn.Module:
    try:
        return open_clip.create_model(name, pretrained=tag)
    except Exception as error:  # whatever the hub's client raises: network, disk, access
        raise RuntimeError(
            f"{KEY}: the weights {tag!r} of {name} could not be had ({first_line(error)}); "
            "with no way to download them, give the path of a weight file"
        ) from error


def _add_config_file(path: str) -> str:
    """Make a model config file known to open_clip; returns the model's name, which is the file's."""
    config = _read_config_file(path)
    name = Path(path).stem
    known = open_clip.get_model_config(name)
    if known is None:
        open_clip.add_model_config(path)
    elif known != config:
        raise ValueError(
            f"MODEL.SPAR.ENCODER: open_clip has another model of the name {name!r}; give the file {path} another name"
        )
    return name


def _read_config_file(path: str) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"MODEL.SPAR.ENCODER: there is no model config file {path}")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"MODEL.SPAR.ENCODER: {path} is no valid JSON: {error}") from error
    wanted = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(config, dict) or any(key not in config for key in wanted):
        raise ValueError(f"MODEL.SPAR.ENCODER: {path} is no open_clip model config, it must have {', '.join(wanted)}")
    return config


@contextlib.contextmanager
def _without_open_clip_warnings() -> Iterator[None]:
    # It warns of missing weights that are loaded a moment later, or that the user did not want.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _is_plain_vit(config: dict | None) -> bool:
    vision = (config or {}).get("vision_cfg", {})
    named_elsewhere = "timm_model_name" in vision or "hf_model_name" in vision
    return not named_elsewhere and isinstance(vision.get("layers", 12), int) and not vision.get("attentional_pool")


def _claims(name: str) -> bool:
    config = _read_config_file(name) if name.endswith(".json") else open_clip.get_model_config(name)
    return config is not None and _is_plain_vit(config)


@functools.cache
def _names() -> list[str]:
    return [name for name in open_clip.list_models() if _is_plain_vit(open_clip.get_model_config(name))]


def _build(name: str, pretrained: str, reference_compat: bool) -> DenseEncoder:
    return OpenCLIPEncoder(create_clip(name, pretrained, part="visual").visual, reference_compat)


def _build_text(name: str, pretrained: str) -> TextTower:
    model = create_clip(name, pretrained, part="text")
    model.visual = nn.Identity()
    return TextTower(model, open_clip.get_tokenizer(Path(name).stem if name.endswith(".json") else name))


def _example() -> DenseEncoder:
    vision = {"image_size": 64, "layers": 3, "width": 96, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return OpenCLIPEncoder(open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).visual).eval()


register_family(
    EncoderFamily(
        name="open_clip ViT",
        claims=_claims,
        names=_names,
        build=_build,
        build_text=_build_text,
        example=_example,
    )
)
