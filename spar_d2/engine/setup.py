"""From command-line arguments to a checked config, for the tools."""

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
from typing import IO

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from spar_d2.utils.errors import make_logs_printable
from spar_d2.utils.io import mark_in_use

_OUT_CHANNELS = "MODEL.SPAR.OUT_CHANNELS"
# What setting up a run writes to its output folder.
_SETUP_FILE = re.compile(r"log\.txt(\.rank\d+)?|config\.yaml|metrics\.json|events\.out\.tfevents\..*")


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Detectron2's config with this project's keys, a yaml file and ``KEY VALUE`` overrides.

    Where ``MODEL.DEVICE`` is a GPU and there is none, it becomes "cpu", with a line on stderr.

    Raises:
        FileNotFoundError: no such config file.
        ValueError: no yaml, or yaml that runs code or has a ``_BASE_`` that is no local file, an unknown key, a value
            of another type, a name that is not registered, or an output folder that cannot be written to.
    """
    cfg = get_cfg()
    flags = [word for word in overrides[::2] if word.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} comes after the first KEY VALUE pair: flags go before the pairs")
    if not config_file:
        raise ValueError("--config-file is needed, for example configs/distill/openclip_vit_b_16_sampled.yaml")
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"--config-file: there is no file {config_file}")
    try:
        _check_yaml(config_file)
        cfg.merge_from_file(config_file, allow_unsafe=False)
        if _OUT_CHANNELS in overrides[::2]:
            # One number or a list of them: yacs would not take one for the other.
            cfg.MODEL.SPAR.OUT_CHANNELS = None
        cfg.merge_from_list(_whole_floats(cfg, overrides))
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(
            f"{config_file} with its overrides cannot be read as a config: {reason}; keys are in spar_d2/config.py"
        ) from error
    _find_files(cfg, config_file)
    check_config(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print(f"MODEL.DEVICE is {cfg.MODEL.DEVICE} but there is no GPU here: using the CPU.", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


class _LocalConfig(CfgNode):
    """Reads a config and all that its ``_BASE_`` names from local files alone."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # Detectron2 would fetch "https://", "s3://", "detectron2://" and the like.
        if "://" in filename:
            raise ValueError(f"_BASE_: {filename} is refused, only local files are read; save it and name the file")
        if not os.path.isfile(filename):
            raise FileNotFoundError(f"_BASE_: there is no file {filename}")
        return open(filename, encoding="utf-8")


def _check_yaml(config_file: str) -> None:
    """Raise ``ValueError`` for yaml that Detectron2 would run as code, or fetch, or never finish reading."""
    try:
        _LocalConfig.load_yaml_with_base(config_file, allow_unsafe=False)
    except yaml.constructor.ConstructorError as error:
        tag = re.search(r"'tag:yaml\.org,2002:(python/[^']*)'", str(error.problem))
        if tag is None:
            raise
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else config_file
        refusal = f"!!{tag[1]} ({place}) is refused, as reading it would run code; write the value itself"
        raise ValueError(refusal) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply, or its _BASE_ leads back to itself") from error


def _whole_floats(cfg: CfgNode, overrides: list) -> list:
    """``KEY VALUE`` pairs with "1" written as "1.0" where the key is a float, which yacs would not take for one."""
    pairs = list(zip(overrides[::2], overrides[1::2]))
    if len(overrides) % 2:
        return overrides  # an error of its own

    return [
        word
        for key, value in pairs
        for word in (key, f"{value}.0" if _is_whole(value) and isinstance(value_at(cfg, str(key)), float) else value)
    ]


def value_at(cfg: CfgNode, key: str) -> object:
    """Value of a key with dots; None where there is none."""
    node = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    return node


def _is_whole(value: object) -> bool:
    return isinstance(value, str) and value.strip().lstrip("+-").isdecimal()


def _find_files(cfg: CfgNode, config_file: str) -> None:
    """Files named in a config may lie relative to the working folder, the config's folder, or one above it."""
    for key in ("ENCODER", "PRETRAINED", "DINOV3_BACKBONE", "VOCABULARY", "TEMPLATES", "DINOV3_REPO"):
        is_there = os.path.isdir if key == "DINOV3_REPO" else os.path.isfile
        value = cfg.MODEL.SPAR[key]
        if not value or os.path.exists(value):
            continue
        candidates = (os.path.join(parent, value) for parent in Path(config_file).resolve().parents)
        cfg.MODEL.SPAR[key] = next((path for path in candidates if is_there(path)), value)


def check_config(cfg: CfgNode) -> None:
    """Raise ``ValueError`` for names that nothing is registered under, and an output folder that cannot be one."""
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
                raise ValueError(f"{key}: nothing is registered as {name!r}; near names: {', '.join(near) or 'none'}")
    folder = Path(cfg.OUTPUT_DIR).absolute()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not cfg.OUTPUT_DIR or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"OUTPUT_DIR must be a folder that can be written to, got {cfg.OUTPUT_DIR!r}")


def prepare(cfg: CfgNode, args: argparse.Namespace, quiet: bool = False) -> None:
    """Freeze the config, make the output folder, set up logging, seeds and ``SPAR.TF32``, as Detectron2's tools do.

    ``quiet`` leaves the console to progress bars: below a warning, logs go to the output folder's log.txt alone.
    """
    cfg.freeze()
    # The same calls as Detectron2's own set-up, which finds the loggers ready and keeps them.
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
def clean_start(output_dir: str) -> Iterator[None]:
    """While a run is being set up: where that fails, the folders that it made for its output are removed again.

    A folder stays where there is anything in it but this run's own log and config, or where another run uses it.
    """
    if not comm.is_main_process():
        yield
        return
    folder = Path(output_dir).absolute()
    made = _make_folders(folder)
    is_alone = mark_in_use(folder)
    try:
        yield
    except BaseException:
        if folder in made and all(_SETUP_FILE.fullmatch(name) for name in os.listdir(folder)) and is_alone():
            logging.shutdown()
            for name in os.listdir(folder):
                (folder / name).unlink()
        with contextlib.suppress(OSError):  # not empty: somebody else uses it
            for path in made:
                path.rmdir()
        raise


def _make_folders(path: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were not there, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made = []
    for folder in reversed(missing):
        # Another run may make it at this moment: then it is not ours.
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.insert(0, folder)
    return made
