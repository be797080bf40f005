"""Config loading and validation, and setup of runs, for command line tools."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.config import BASE_KEY

from spar_d2.model_zoo import get_config_file
from spar_d2.utils.errors import make_logs_printable
from spar_d2.utils.images import check_sides
from spar_d2.utils.io import LOCK, atomic_write, file_lock, mark_in_use

# Maximum number of values in a config file; Detectron2's largest config has a few hundred.
_MAX_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
_OUT_CHANNELS = "MODEL.SPAR.OUT_CHANNELS"
# Files that the setup of a run writes to its output folder.
_SETUP_FILE = re.compile(r"log\.txt(\.rank\d+)?|config\.yaml|metrics\.json|events\.out\.tfevents\..*")


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Load a YAML config file and apply ``KEY VALUE`` overrides.

    If ``MODEL.DEVICE`` is a GPU but none is available, it is set to "cpu", with a message on stderr.

    Raises:
        FileNotFoundError: the config file does not exist.
        ValueError: the file is not valid YAML, would execute code, or has a ``_BASE_`` that is not a local file; a key
            is unknown; a value has the wrong type; a name is not registered; or the output folder is not writable.
    """
    cfg = _LocalConfig(get_cfg())
    flags = [key for key in overrides[::2] if key.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} must be before the first KEY VALUE pair")
    if not config_file:
        raise ValueError("--config-file is required, for example configs/distill/openclip_vit_b_16_sampled.yaml")
    if not os.path.isfile(config_file):
        config_file = _from_model_zoo(config_file)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg = CfgNode(cfg)
        if _OUT_CHANNELS in overrides[::2]:
            # Numbers and lists are both allowed, but yacs would reject a change of the type.
            cfg.MODEL.SPAR.OUT_CHANNELS = None
        cfg.merge_from_list(_whole_floats(cfg, overrides))
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = " ".join(str(reason).split())
        raise ValueError(
            f"{config_file} with its overrides cannot be read as a config: {reason}; see spar_d2/config.py for the keys"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{config_file} is nested too deeply, or its _BASE_ is circular") from error
    _find_files(cfg, config_file)
    check_config(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but no GPU is available; using the CPU.", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _from_model_zoo(name: str) -> str:
    """Path of a config of this project by its name, such as "segment/openclip_vit_b_16.yaml"."""
    try:
        return get_config_file(name.removeprefix("configs/"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config-file: there is no file {name}, and {error}") from error


class _LocalConfig(CfgNode):
    """Config that reads only local files (also for ``_BASE_``) with plain values."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # Detectron2 would download "https://", "s3://", "detectron2://" and similar URLs.
        if "://" in filename:
            raise ValueError(f"_BASE_: {filename} must be a local file, not a URL; download it first")
        if not os.path.isfile(filename):
            raise FileNotFoundError(f"_BASE_: there is no file {filename}")
        with open(filename, encoding="utf-8") as file:
            _check_yaml(yaml.compose(file, Loader=yaml.SafeLoader), filename)
        return open(filename, encoding="utf-8")


def _check_yaml(root: yaml.Node | None, file: str) -> None:
    """Raise ``ValueError`` for YAML that is not a config, would execute code, or expands without limit."""
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None or root.tag == f"{_TAG}null" else f"is a {getattr(root, 'id', 'value')}"
        raise ValueError(f"{file} {what}, but must have lines of KEY: VALUE")
    if _size(root, {}, file) > _MAX_VALUES:
        raise ValueError(f"{file} must have at most {_MAX_VALUES} values, including expanded aliases (*NAME)")
    for bases in (value for key, value in root.value if key.value == BASE_KEY):
        names = bases.value if isinstance(bases, yaml.SequenceNode) else [bases]
        if not all(name.tag == f"{_TAG}str" and name.value for name in names):
            got = f"got {bases.value!r}" if isinstance(bases, yaml.ScalarNode) else f"got a {bases.id}"
            raise ValueError(f"{BASE_KEY} in {file} must be a file name, or a list of file names, {got}")


def _size(node: yaml.Node, known: dict[int, float], file: str) -> float:
    """Return the number of values after expansion of aliases; each node is visited once."""
    if id(node) not in known:
        known[id(node)] = math.nan
        position = f"{file}, line {node.start_mark.line + 1}"
        if node.tag.startswith(f"{_TAG}python/"):
            tag = node.tag.removeprefix(_TAG)
            raise ValueError(
                f"!!{tag} ({position}) is not allowed, because it would execute code; write the value itself"
            )
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            if odd := [key for key, _ in parts if key.tag not in (f"{_TAG}str", f"{_TAG}merge")]:
                got = repr(odd[0].value) if isinstance(odd[0], yaml.ScalarNode) else f"a {odd[0].id}"
                raise ValueError(f"keys must be strings ({position}), got {got}; quote it")
            parts = [value for _, value in parts]
        known[id(node)] = 1 + sum(_size(part, known, file) for part in parts)
    if math.isnan(known[id(node)]):
        raise ValueError(f"an alias (*NAME) in {file} refers to a node that contains it; write the value itself")
    return known[id(node)]


def _whole_floats(cfg: CfgNode, overrides: list) -> list:
    """Write integers as floats ("1" as "1.0") in ``KEY VALUE`` pairs with float keys, because yacs rejects integers."""
    pairs = list(zip(overrides[::2], overrides[1::2]))
    if len(overrides) % 2:
        return overrides  # yacs reports the error

    return [
        item
        for key, value in pairs
        for item in (key, f"{value}.0" if _is_whole(value) and isinstance(value_at(cfg, str(key)), float) else value)
    ]


def value_at(cfg: CfgNode, key: str) -> object:
    """Return the value of a dotted key, or None if it does not exist."""
    node = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    return node


def _is_whole(value: object) -> bool:
    return isinstance(value, str) and value.strip().lstrip("+-").isdecimal()


def _find_files(cfg: CfgNode, config_file: str) -> None:
    """Resolve files in a config relative to the current folder, the folder of the config, or its parents."""
    for key in ("ENCODER", "PRETRAINED", "DINOV3_BACKBONE", "VOCABULARY", "TEMPLATES", "DINOV3_REPO"):
        is_there = os.path.isdir if key == "DINOV3_REPO" else os.path.isfile
        value = cfg.MODEL.SPAR[key]
        if not value or os.path.exists(value):
            continue
        candidates = (os.path.join(parent, value) for parent in Path(config_file).resolve().parents)
        cfg.MODEL.SPAR[key] = next((path for path in candidates if is_there(path)), value)


def check_config(cfg: CfgNode) -> None:
    """Raise ``ValueError`` for unregistered names, invalid sizes, and output folders that are not writable."""
    choices = {
        "MODEL.META_ARCHITECTURE": ([cfg.MODEL.META_ARCHITECTURE], [name for name, _ in META_ARCH_REGISTRY]),
        "MODEL.BACKBONE.NAME": ([cfg.MODEL.BACKBONE.NAME], [name for name, _ in BACKBONE_REGISTRY]),
        "DATASETS.TEST": (cfg.DATASETS.TEST, DatasetCatalog.list()),
        "DATASETS.TRAIN": (() if cfg.SPAR.DATA.IMAGES else cfg.DATASETS.TRAIN, DatasetCatalog.list()),
    }
    for key, (names, known) in choices.items():
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
                hint = f"did you mean {', '.join(near)}?" if near else "no similar name is registered"
                raise ValueError(f"{key}: {name!r} is not registered; {hint}")
    sides = ("INPUT.MIN_SIZE_TEST", "INPUT.MIN_SIZE_TRAIN", "TEST.AUG.MIN_SIZES", "SPAR.TEACHER.WINDOW")
    for key in (*sides, "SPAR.DATA.SCALE_BOX", "SPAR.DATA.MIN_SHORT_SIDE"):
        check_sides(key, value_at(cfg, key))
    folder = Path(cfg.OUTPUT_DIR).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not cfg.OUTPUT_DIR or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"OUTPUT_DIR must be a writable folder, got {cfg.OUTPUT_DIR!r}")


def prepare(cfg: CfgNode, args: argparse.Namespace, quiet: bool = False) -> None:
    """Freeze the config, create the output folder, and set up logging, seeds and ``SPAR.TF32``.

    Args:
        cfg: config.
        args: arguments for Detectron2's ``default_setup``.
        quiet: whether to show only warnings and errors on the console, so that logs do not disturb progress bars.
            ``log.txt`` in the output folder has all messages.
    """
    cfg.freeze()
    # The same calls as in default_setup(), which then reuses these loggers.
    rank = comm.get_rank()
    loggers = [
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore"),
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank),
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="spar_d2", abbrev_name="spar_d2"),
    ]
    make_logs_printable(*loggers)
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if quiet and getattr(handler, "stream", None) is sys.stdout:
            handler.setLevel(logging.WARNING)
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE.startswith("cuda"):
        torch.set_float32_matmul_precision("high" if cfg.SPAR.TF32 else "highest")


@contextlib.contextmanager
def clean_start(output_dir: str, trains: bool = True) -> Iterator[None]:
    """Context manager for the setup of a run, which removes newly created output folders if the setup fails.

    A folder is kept if it contains files other than the log and config of this run, or if another run uses it. The
    config of an earlier run is restored.

    Args:
        output_dir: output folder of the run.
        trains: whether the run trains, and writes checkpoints to the folder.

    Raises:
        RuntimeError: the run trains, and another run is training in the same folder.
    """
    if not comm.is_main_process():
        yield
        return
    folder = Path(output_dir).absolute()
    if trains and (folder / LOCK).exists():
        with file_lock(folder):
            pass
    created = _make_folders(folder)
    config = folder / "config.yaml"
    previous = config.read_bytes() if config.is_file() else None
    is_alone = mark_in_use(folder)
    try:
        yield
    except BaseException:
        if folder in created and all(_SETUP_FILE.fullmatch(name) for name in os.listdir(folder)) and is_alone():
            logging.shutdown()
            for name in os.listdir(folder):
                (folder / name).unlink()
        if previous is not None:
            with atomic_write(config) as temporary:
                temporary.write_bytes(previous)
        with contextlib.suppress(OSError):  # not empty: used by another run
            for path in created:
                path.rmdir()
        raise


def _make_folders(path: Path) -> list[Path]:
    """Create a folder and its parents, and return the newly created folders, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    created = []
    for folder in reversed(missing):
        # Another run may create the folder at the same time.
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            created.insert(0, folder)
    return created
