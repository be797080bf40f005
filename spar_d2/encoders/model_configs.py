"""Model configs of open_clip's form, by name or from a file (*.json)."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import open_clip
import timm
import torch

from spar_d2.encoders.origin import Conventions, Triple, check_triple
from spar_d2.utils.io import signature

_KEY = "MODEL.SPAR.ENCODER"
# What open_clip calls the config in a folder with a model; the folder then has the model's name.
_IN_FOLDER = "open_clip_config"
_LARGEST = 1 << 20
_MOST_LAYERS = 1000
_WANTED = ("embed_dim", "vision_cfg", "text_cfg")
_NUMBERS = {
    "vision_cfg": ("image_size", "patch_size", "width", "layers", "head_width"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers"),
}
_NAMES = ("timm_model_name", "timm_pool", "timm_proj", "hf_model_name", "hf_tokenizer_name")


def model_config(name: str) -> dict | None:
    """The open_clip config of a model name or of a config file (*.json); None for an unknown name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no model config; the message says what in it is wrong.
    """
    if name.endswith(".json"):
        return _read_file(name)[0]
    # With a schema ("hf-hub:...") open_clip would go looking for the model elsewhere, only to learn what it is.
    return None if ":" in name else open_clip.get_model_config(name)


def known_config(name: str) -> dict:
    """:func:`model_config` of a name that a family claims."""
    config = model_config(name)
    if config is None:
        raise ValueError(f"{_KEY}: open_clip has no model {name!r}")
    return config


def timm_sizes(name: str) -> tuple[int, int]:
    """Native size and patch size of one of timm's ViTs in pixels, without building its weights."""
    with torch.device("meta"):
        embed = cast(Any, timm.create_model(name, num_classes=0).patch_embed)
    patch = embed.patch_size[0]
    return embed.grid_size[0] * patch, patch


def model_names(wanted: Callable[[dict | None], bool]) -> list[str]:
    """The models of open_clip whose config is ``wanted``, well-known ones first."""
    names = [name for name in open_clip.list_models() if wanted(open_clip.get_model_config(name))]
    return sorted(names, key=lambda name: (not name.startswith("ViT"), name))


def known_name(name: str) -> str:
    """A name that open_clip knows the model by; that of a config file is the file's, or its folder's."""
    if not name.endswith(".json"):
        return name
    config, _ = _read_file(name)
    own = _own_name(name)
    known = open_clip.get_model_config(own)
    if known is None:
        # open_clip adds files only, and of one of the two forms only.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"{own}.json"
            copy.write_text(json.dumps(config), encoding="utf-8")
            open_clip.add_model_config(copy)
    elif known != config:
        what = "file" if Path(name).stem == own else "folder of"
        raise ValueError(
            f"{_KEY}: open_clip has another model of the name {own!r}; give the {what} {name} another name"
        )
    return own


def _own_name(name: str) -> str:
    path = Path(name)
    if not name.endswith(".json"):
        return name
    return path.resolve().parent.name if path.stem == _IN_FOLDER else path.stem


def conventions(name: str, tag: str, mean: Triple, std: Triple) -> Conventions:
    """What a model expects by its tag, its config file, or else by its name.

    Args:
        name: of the model, or a config file.
        tag: of its weights; anything else counts as none.
        mean, std: of the family.
    """
    config, preprocess = _read_file(name) if name.endswith(".json") else (known_config(name), {})
    said = open_clip.get_pretrained_cfg(_own_name(name), tag) if tag in tags_of(name) else preprocess
    quick_gelu = said.get("quick_gelu", config.get("quick_gelu", False))
    return Conventions(tuple(said.get("mean", mean)), tuple(said.get("std", std)), bool(quick_gelu))


def tags_of(name: str) -> list[str]:
    """Tags that open_clip has for a model."""
    return open_clip.list_pretrained_tags_by_model(_own_name(name))


def side_of(value: int | list[int]) -> int:
    """One number of a config that may be one for height and one for width."""
    return value if isinstance(value, int) else value[0]


def _read_file(path: str) -> tuple[dict, dict]:
    """A model's config, and how its images are prepared, in either of open_clip's forms: side by side, or in one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{_KEY}: there is no model config file {path}")
    return copy.deepcopy(_read_version(path, signature(path)))


# A start asks for it a dozen times.
@functools.lru_cache(maxsize=32)
def _read_version(path: str, version: tuple) -> tuple[dict, dict]:
    """The file as it was when it had this signature."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_KEY}: {path} is no valid JSON: {error}") from error
    config = content.get("model_cfg", content) if isinstance(content, dict) else None
    if not isinstance(config, dict) or any(key not in config for key in _WANTED):
        raise ValueError(f"{_KEY}: {path} is no open_clip model config, it must have {', '.join(_WANTED)}")
    preprocess = content.get("preprocess_cfg", {})
    config = {key: value for key, value in config.items() if key != "preprocess_cfg"}
    try:
        _check(config)
        if not isinstance(preprocess, dict):
            raise ValueError(f"preprocess_cfg must be a JSON object, got {preprocess!r}")
        least = {"mean": float("-inf"), "std": 0.0}
        said = {key: preprocess[key] for key in least if key in preprocess}
        statistics = {key: check_triple(value, f"preprocess_cfg.{key}", least[key]) for key, value in said.items()}
    except ValueError as error:
        raise ValueError(f"{_KEY}: {path} is no open_clip model config: {error}") from error
    return config, statistics


def _check(config: Mapping) -> None:
    """Raise ``ValueError`` for values that open_clip would stumble over, or build no end of."""
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
                raise ValueError(f"{part}.{key} must be a text, got {config[part][key]!r}")
    vision = config["vision_cfg"]
    if side_of(vision.get("patch_size", 16)) > side_of(vision.get("image_size", 224)):
        raise ValueError("vision_cfg.patch_size must not be more than vision_cfg.image_size")


def _check_number(name: str, value: object) -> None:
    key = name.rpartition(".")[2]
    numbers = value if isinstance(value, list) else [value]
    pair = key == "layers" or (key in ("image_size", "patch_size") and len(numbers) == 2)
    most = _MOST_LAYERS if key == "layers" else _LARGEST
    if key == "vocab_size":
        most = 1 << 24
    for number in numbers if pair else [value]:
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
            raise ValueError(f"{name} must be a whole number in 1..{most}, got {value!r}")
