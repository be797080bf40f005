"""open_clip model configs, by model name or from a JSON file."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch

from spar_d2.encoders.origin import Conventions, Triple, check_triple
from spar_d2.utils.io import signature

_KEY = "MODEL.SPAR.ENCODER"
# Stem of the config file in an open_clip model folder; the model is then named after the folder.
_IN_FOLDER = "open_clip_config"
_HASH_DIGITS = 12
_LARGEST = 1 << 20
_MOST_LAYERS = 1000
_REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
_NUMBERS = {
    "vision_cfg": ("image_size", "patch_size", "width", "layers", "head_width"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers"),
}
_NAMES = ("timm_model_name", "timm_pool", "timm_proj", "hf_model_name", "hf_tokenizer_name")


def model_config(name: str) -> dict | None:
    """Return the open_clip config of a model name or config file (*.json), or None if the name is unknown.

    Raises:
        FileNotFoundError: the config file does not exist.
        ValueError: the file is not a valid model config; the message states the problem.
    """
    if name.endswith(".json"):
        return _read_file(name)[0]
    # For names with a schema ("hf-hub:..."), open_clip would download the config.
    return None if ":" in name else open_clip.get_model_config(name)


def known_config(name: str) -> dict:
    """Return the config of a known model, see :func:`model_config`."""
    config = model_config(name)
    if config is None:
        raise ValueError(f"{_KEY}: open_clip has no model {name!r}")
    return config


def timm_sizes(name: str) -> tuple[int, int]:
    """Return pre-training image size and patch size of a timm ViT in pixels, without allocating its weights."""
    with torch.device("meta"):
        embed = cast(Any, timm.create_model(name, num_classes=0).patch_embed)
    patch = embed.patch_size[0]
    return embed.grid_size[0] * patch, patch


def timm_statistics(name: str, mean: Sequence[float], std: Sequence[float]) -> tuple[Triple, Triple]:
    """Return the pixel mean and standard deviation of a timm model or tag; the given ones if timm has none."""
    cfg = timm.get_pretrained_cfg(name)
    given = (mean, std) if cfg is None else (cfg.mean, cfg.std)
    return check_triple(given[0], "mean"), check_triple(given[1], "std", above=0)


@functools.cache
def model_names(wanted: Callable[[dict | None], bool]) -> list[str]:
    """Return the open_clip models whose config satisfies ``wanted``, names that start with "ViT" first."""
    names = [name for name in open_clip.list_models() if wanted(open_clip.get_model_config(name))]
    return sorted(names, key=lambda name: (not name.startswith("ViT"), name))


def known_name(name: str) -> str:
    """Return the open_clip name of a model, with which a config file is registered.

    It is that of the file or folder, with a hash of the content if open_clip has a different model of this name.
    """
    if not name.endswith(".json"):
        return name
    config, own_name = _read_file(name)[0], _own_name(name)
    if open_clip.get_model_config(own_name) is None:
        # open_clip registers only files, and only one of the two config formats.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"{own_name}.json"
            copy.write_text(json.dumps(config), encoding="utf-8")
            open_clip.add_model_config(copy)
    return own_name


def _own_name(name: str) -> str:
    """Return the open_clip name of a model, without registering it."""
    if not name.endswith(".json"):
        return name
    path, (config, _) = Path(name), _read_file(name)
    own_name = path.resolve().parent.name if path.stem == _IN_FOLDER else path.stem
    if open_clip.get_model_config(own_name) in (None, config):
        return own_name
    content = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return f"{own_name}-{content[:_HASH_DIGITS]}"


def conventions(name: str, tag: str, mean: Triple, std: Triple) -> Conventions:
    """Return the pixel statistics and activation of a tag, else of the config file, else of the model.

    Args:
        name: model name or config file.
        tag: pretrained tag; values that are not a tag of the model are ignored.
        mean, std: default pixel statistics of the family.
    """
    config, preprocess = _read_file(name) if name.endswith(".json") else (known_config(name), {})
    settings = open_clip.get_pretrained_cfg(_own_name(name), tag) if tag in tags_of(name) else preprocess
    quick_gelu = settings.get("quick_gelu", config.get("quick_gelu", False))
    return Conventions(tuple(settings.get("mean", mean)), tuple(settings.get("std", std)), bool(quick_gelu))


def tags_of(name: str) -> list[str]:
    """Return the pretrained tags of a model in open_clip."""
    return open_clip.list_pretrained_tags_by_model(_own_name(name))


def side_of(value: int | list[int]) -> int:
    """Return the first of a config's sizes, which are one number or [height, width]."""
    return value if isinstance(value, int) else value[0]


def _read_file(path: str) -> tuple[dict, dict]:
    """Read model config and preprocessing config from either of open_clip's JSON formats."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{_KEY}: there is no model config file {path}")
    return copy.deepcopy(_read_version(path, signature(path)))


# Cached, because building a model reads the file about a dozen times.
@functools.lru_cache(maxsize=32)
def _read_version(path: str, version: tuple) -> tuple[dict, dict]:
    """Read the file; ``version`` is its file signature, which invalidates the cache after changes."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_KEY}: {path} is not valid JSON: {error}") from error
    config = content.get("model_cfg", content) if isinstance(content, dict) else None
    if not isinstance(config, dict) or any(key not in config for key in _REQUIRED):
        raise ValueError(
            f"{_KEY}: {path} is not an open_clip model config, which must have the keys {', '.join(_REQUIRED)}"
        )
    preprocess = content.get("preprocess_cfg", {})
    config = {key: value for key, value in config.items() if key != "preprocess_cfg"}
    try:
        _check(config)
        config = _with_norm_eps(config)
        if not isinstance(preprocess, dict):
            raise ValueError(f"preprocess_cfg must be a JSON object, got {preprocess!r}")
        bounds = {"mean": float("-inf"), "std": 0.0}
        given = {key: preprocess[key] for key in bounds if key in preprocess}
        statistics = {key: check_triple(value, f"preprocess_cfg.{key}", bounds[key]) for key, value in given.items()}
    except ValueError as error:
        raise ValueError(f"{_KEY}: {path} is not a valid open_clip model config: {error}") from error
    return config, statistics


def _check(config: Mapping) -> None:
    """Raise ``ValueError`` for values that would crash open_clip or build an excessively large model."""
    _check_number("embed_dim", config["embed_dim"])
    if not isinstance(config.get("quick_gelu", False), bool):
        raise ValueError(f"quick_gelu must be true or false, got {config['quick_gelu']!r}")
    for part, numbers in _NUMBERS.items():
        if not isinstance(config[part], dict):
            raise ValueError(f"{part} must be a JSON object, got {config[part]!r}")
        for key in (key for key in numbers if key in config[part]):
            _check_number(f"{part}.{key}", config[part][key])
        for key in (key for key in _NAMES if key in config[part]):
            if not isinstance(config[part][key], str) and not (key == "timm_proj" and config[part][key] is None):
                raise ValueError(f"{part}.{key} must be a string, got {config[part][key]!r}")
    vision = config["vision_cfg"]
    if side_of(vision.get("patch_size", 16)) > side_of(vision.get("image_size", 224)):
        raise ValueError("vision_cfg.patch_size must not be greater than vision_cfg.image_size")


def _with_norm_eps(config: dict) -> dict:
    """Convert ``layer_norm_eps`` (of the model or a tower) to open_clip's ``norm_kwargs``."""
    config = dict(config)
    shared = {"layer_norm_eps": config.pop("layer_norm_eps")} if "layer_norm_eps" in config else {}
    for part in _NUMBERS:
        tower = {**shared, **config[part]}
        if "layer_norm_eps" not in tower:
            continue
        eps = tower.pop("layer_norm_eps")
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise ValueError(f"{part}.layer_norm_eps must be a number between 0 and 1, got {eps!r}")
        if any(key.startswith(("timm_", "hf_model")) for key in tower):
            raise ValueError(f"{part}.layer_norm_eps must not be set for a tower of timm or transformers")
        config[part] = {**tower, "norm_kwargs": {**(tower.get("norm_kwargs") or {}), "eps": eps}}
    return config


def _check_number(name: str, value: object) -> None:
    key = name.rpartition(".")[2]
    numbers = value if isinstance(value, list) else [value]
    pair = key == "layers" or (key in ("image_size", "patch_size") and len(numbers) == 2)
    most = _MOST_LAYERS if key == "layers" else _LARGEST
    if key == "vocab_size":
        most = 1 << 24
    for number in numbers if pair else [value]:
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
            raise ValueError(f"{name} must be an integer in 1..{most}, got {value!r}")
