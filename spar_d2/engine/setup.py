"""Loads and validates configs, and sets up runs, for the command-line tools."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.config import BASE_KEY

from spar_d2.data.datasets.file_registration import check_registered, register_dataset_file
from spar_d2.encoders.folders import model_folder
from spar_d2.engine.derived_keys import GivenKeys, given_keys, settle_classes, settle_encoder, settle_steps, value_at
from spar_d2.model_zoo import get_config_file
from spar_d2.utils.errors import make_logs_printable
from spar_d2.utils.images import check_sides
from spar_d2.utils.io import LOCK, atomic_write, file_lock, mark_in_use
from spar_d2.utils.yaml_files import check_yaml, is_string

_OUT_CHANNELS = "MODEL.SPAR.OUT_CHANNELS"
# Files that the setup of a run writes to its output folder.
_SETUP_FILE = re.compile(r"log\.txt(\.rank\d+)?|config\.yaml|metrics\.json|events\.out\.tfevents\..*")


def load_config(config_file: str, overrides: list[str], trains: bool = False) -> CfgNode:
    """Load a YAML config file and apply ``KEY VALUE`` overrides.

    The data-set files of ``SPAR.DATA.REGISTER`` are registered, and numbers of classes are taken from them. If
    ``MODEL.DEVICE`` is a GPU but none is available, it is set to "cpu", with a message on stderr.

    Args:
        config_file: path, or name of a config of this project.
        overrides: alternating keys and values.
        trains: whether the config is for a training; then ``SPAR.DATA.EPOCHS`` is converted to steps.

    Raises:
        FileNotFoundError: the config file does not exist.
        ValueError: the file is not valid YAML, would execute code, or has a ``_BASE_`` that is not a local file; a key
            is unknown; a value has the wrong type; a name is not registered; the output folder is not writable; or a
            data-set file and the config are incompatible.
    """
    cfg = _LocalConfig(get_cfg())
    flags = [key for key in overrides[::2] if key.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} must be before the first KEY VALUE pair")
    if not config_file:
        raise ValueError("--config-file is required, for example configs/distill/openclip_vit_b_16_sampled.yaml")
    config_file = _config_path(config_file)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg = CfgNode(cfg)
        if _OUT_CHANNELS in overrides[::2]:
            # Numbers and lists are both allowed, but yacs would reject a value of another type than the current one.
            cfg.MODEL.SPAR.OUT_CHANNELS = None
        cfg.merge_from_list(_typed(cfg, overrides))
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = " ".join(str(reason).split())
        raise ValueError(
            f"{config_file} with its overrides cannot be read as a config: {reason}; see spar_d2/config.py for the keys"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{config_file} is nested too deeply, or its _BASE_ is circular") from error
    _find_files(cfg, config_file)
    if model_folder(cfg.MODEL.SPAR.ENCODER):
        settle_encoder(cfg, given_keys(config_file, overrides))
    if cfg.SPAR.DATA.REGISTER or cfg.SPAR.DATA.EPOCHS:
        given = given_keys(config_file, overrides)
        _register_files(cfg, config_file, given)
    check_config(cfg)
    if cfg.SPAR.DATA.EPOCHS and trains:
        settle_steps(cfg, given)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but no GPU is available; using the CPU.", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _config_path(name: str) -> str:
    """Return the path of a config file, or of a config of this project ("segment/openclip_vit_b_16.yaml")."""
    if os.path.isfile(name):
        return name
    try:
        return get_config_file(name.removeprefix("configs/"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config-file: there is no file {name}, and {error}") from error


class _LocalConfig(CfgNode):
    """Config that reads only local files, also for ``_BASE_``, and rejects YAML that would execute code."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # Detectron2 would download "https://", "s3://", "detectron2://" and similar URLs.
        if "://" in filename:
            raise ValueError(f"_BASE_: {filename} must be a local file, not a URL; download it first")
        if not os.path.isfile(filename):
            raise FileNotFoundError(f"_BASE_: there is no file {filename}")
        with open(filename, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
        check_yaml(root, filename)
        _check_bases(cast(yaml.MappingNode, root), filename)
        return open(filename, encoding="utf-8")


def _check_bases(root: yaml.MappingNode, file: str) -> None:
    """Raise ``ValueError`` for a ``_BASE_`` that is not a file name or a list of file names."""
    for bases in (value for key, value in root.value if key.value == BASE_KEY):
        names = bases.value if isinstance(bases, yaml.SequenceNode) else [bases]
        if not all(is_string(name) and name.value for name in names):
            got = f"got {bases.value!r}" if isinstance(bases, yaml.ScalarNode) else f"got a {bases.id}"
            raise ValueError(f"{BASE_KEY} in {file} must be a file name, or a list of file names, {got}")


def _typed(cfg: CfgNode, overrides: list) -> list:
    """Adapt the values of ``KEY VALUE`` pairs to the types of their keys, because yacs does not convert them.

    Integers of float keys become floats ("1.0" for "1"), and names of tuple keys become tuples ("a,b").
    """
    if len(overrides) % 2:
        return overrides  # yacs reports the error
    return [item for key, value in zip(overrides[::2], overrides[1::2]) for item in (key, _as_type(cfg, key, value))]


def _as_type(cfg: CfgNode, key: object, value: object) -> object:
    default = value_at(cfg, str(key))
    if _is_whole(value) and isinstance(default, float):
        return f"{value}.0"
    is_names = isinstance(default, (tuple, list)) and all(isinstance(part, str) for part in default)
    if is_names and isinstance(value, str) and re.fullmatch(r"[^()\[\]'\"]+", value) and not _is_whole(value):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, str) and value.strip().lstrip("+-").isdecimal()


def _find_files(cfg: CfgNode, config_file: str) -> None:
    """Resolve files in a config relative to the current folder, else the config's folder, else the parents of that."""
    for key in ("ENCODER", "PRETRAINED", "DINOV3_BACKBONE", "VOCABULARY", "TEMPLATES", "DINOV3_REPO"):
        is_there = {"DINOV3_REPO": os.path.isdir, "ENCODER": os.path.exists}.get(key, os.path.isfile)
        value = cfg.MODEL.SPAR[key]
        if not value or os.path.exists(value):
            continue
        candidates = (os.path.join(parent, value) for parent in Path(config_file).resolve().parents)
        cfg.MODEL.SPAR[key] = next((path for path in candidates if is_there(path)), value)


def _register_files(cfg: CfgNode, config_file: str, given: GivenKeys) -> None:
    """Register data-set files, check the data sets of the config, and set numbers of classes."""
    folders = [Path.cwd(), *Path(config_file).resolve().parents]
    files = []
    for name in cfg.SPAR.DATA.REGISTER:
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"SPAR.DATA.REGISTER: there is no file {name}")
        files.append(str(path))
        register_dataset_file(path)
    # Absolute, so that a stored config can be used anywhere.
    cfg.SPAR.DATA.REGISTER = tuple(files)
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        check_registered(name)
    settle_classes(cfg, given)


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
        quiet: whether to show only warnings and errors on the console, so that other messages do not break progress
            bars. ``log.txt`` in the output folder has all messages.
    """
    cfg.freeze()
    # default_setup() makes the same calls, and then reuses these loggers.
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
    # Detectron2 logs the content of the file.
    default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": _config_path(args.config_file)}))
    if cfg.MODEL.DEVICE.startswith("cuda"):
        torch.set_float32_matmul_precision("high" if cfg.SPAR.TF32 else "highest")


@contextlib.contextmanager
def clean_start(output_dir: str, trains: bool = True) -> Iterator[None]:
    """Context manager for the setup of a run. If the setup fails, it removes the output folders that it created.

    A folder is kept if it contains other files than those that the setup writes (config, logs and metrics), or if
    another run uses it. The ``config.yaml`` of an earlier run is restored.

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
