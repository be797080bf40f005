"""From command-line arguments to a checked config, for the tools."""

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

# Of one file; Detectron2's largest has some hundreds.
_MOST_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
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
    cfg = _LocalConfig(get_cfg())
    flags = [word for word in overrides[::2] if word.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} comes after the first KEY VALUE pair: flags go before the pairs")
    if not config_file:
        raise ValueError("--config-file is needed, for example configs/distill/openclip_vit_b_16_sampled.yaml")
    if not os.path.isfile(config_file):
        config_file = _from_model_zoo(config_file)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg = CfgNode(cfg)
        if _OUT_CHANNELS in overrides[::2]:
            # One number or a list of them: yacs would not take one for the other.
            cfg.MODEL.SPAR.OUT_CHANNELS = None
        cfg.merge_from_list(_whole_floats(cfg, overrides))
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = " ".join(str(reason).split())
        raise ValueError(
            f"{config_file} with its overrides cannot be read as a config: {reason}; keys are in spar_d2/config.py"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{config_file} is nested too deeply, or its _BASE_ leads back to itself") from error
    _find_files(cfg, config_file)
    check_config(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print(f"MODEL.DEVICE is {cfg.MODEL.DEVICE} but there is no GPU here: using the CPU.", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _from_model_zoo(name: str) -> str:
    """Path of a config of this project by its name, such as "segment/openclip_vit_b_16.yaml"."""
    try:
        return get_config_file(name.removeprefix("configs/"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config-file: there is no file {name}, and {error}") from error


class _LocalConfig(CfgNode):
    """Reads a config, and all that its ``_BASE_`` names, from local files of keys and plain values alone."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # Detectron2 would fetch "https://", "s3://", "detectron2://" and the like.
        if "://" in filename:
            raise ValueError(f"_BASE_: {filename} is refused, only local files are read; save it and name the file")
        if not os.path.isfile(filename):
            raise FileNotFoundError(f"_BASE_: there is no file {filename}")
        with open(filename, encoding="utf-8") as file:
            _check_yaml(yaml.compose(file, Loader=yaml.SafeLoader), filename)
        return open(filename, encoding="utf-8")


def _check_yaml(root: yaml.Node | None, file: str) -> None:
    """Raise ``ValueError`` for yaml that is no config, would run code, or never ends."""
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None or root.tag == f"{_TAG}null" else f"is a {getattr(root, 'id', 'value')}"
        raise ValueError(f"{file} {what}, and must have lines of KEY: VALUE")
    if _size(root, {}, file) > _MOST_VALUES:
        raise ValueError(f"{file} has more than {_MOST_VALUES} values, counting what its aliases (*NAME) stand for")
    for bases in (value for key, value in root.value if key.value == BASE_KEY):
        names = bases.value if isinstance(bases, yaml.SequenceNode) else [bases]
        if not all(name.tag == f"{_TAG}str" and name.value for name in names):
            got = f"got {bases.value!r}" if isinstance(bases, yaml.ScalarNode) else f"got a {bases.id}"
            raise ValueError(f"{BASE_KEY} in {file} must be the name of a file, or a list of names, {got}")


def _size(node: yaml.Node, known: dict[int, float], file: str) -> float:
    """How many values there are, with those that aliases repeat; each node is looked at once."""
    if id(node) not in known:
        known[id(node)] = math.nan
        place = f"{file}, line {node.start_mark.line + 1}"
        if node.tag.startswith(f"{_TAG}python/"):
            tag = node.tag.removeprefix(_TAG)
            raise ValueError(f"!!{tag} ({place}) is refused, as reading it would run code; write the value itself")
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            if odd := [key for key, _ in parts if key.tag not in (f"{_TAG}str", f"{_TAG}merge")]:
                got = repr(odd[0].value) if isinstance(odd[0], yaml.ScalarNode) else f"a {odd[0].id}"
                raise ValueError(f"keys must be text ({place}), got {got}; quote it")
            parts = [value for _, value in parts]
        known[id(node)] = 1 + sum(_size(part, known, file) for part in parts)
    if math.isnan(known[id(node)]):
        raise ValueError(f"an alias (*NAME) in {file} stands within what it names; write the value itself")
    return known[id(node)]


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
    """Raise ``ValueError`` for names that nothing is registered under, absurd sizes, and what is no output folder."""
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
    sides = ("INPUT.MIN_SIZE_TEST", "INPUT.MIN_SIZE_TRAIN", "TEST.AUG.MIN_SIZES", "SPAR.TEACHER.WINDOW")
    for key in (*sides, "SPAR.DATA.SCALE_BOX", "SPAR.DATA.MIN_SHORT_SIDE"):
        check_sides(key, value_at(cfg, key))
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
def clean_start(output_dir: str, trains: bool = True) -> Iterator[None]:
    """While a run is being set up: where that fails, the folders that it made for its output are removed again.

    A folder stays where there is anything in it but this run's own log and config, or where another run uses it; the
    config of an earlier run then is what it was.

    Args:
        output_dir: of the run.
        trains: whether it will write checkpoints there.

    Raises:
        RuntimeError: it trains, and another run is training there.
    """
    if not comm.is_main_process():
        yield
        return
    folder = Path(output_dir).absolute()
    if trains and (folder / LOCK).exists():
        with file_lock(folder):
            pass
    made = _make_folders(folder)
    config = folder / "config.yaml"
    earlier = config.read_bytes() if config.is_file() else None
    is_alone = mark_in_use(folder)
    try:
        yield
    except BaseException:
        if folder in made and all(_SETUP_FILE.fullmatch(name) for name in os.listdir(folder)) and is_alone():
            logging.shutdown()
            for name in os.listdir(folder):
                (folder / name).unlink()
        if earlier is not None:
            with atomic_write(config) as temporary:
                temporary.write_bytes(earlier)
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
