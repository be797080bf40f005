"""From command-line arguments to a checked config, for the tools."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

logger = logging.getLogger(__name__)

# Set to see where an error came from instead of its message alone.
TRACEBACK_VARIABLE = "SPAR_TRACEBACK"


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Detectron2's config with this project's keys, a yaml file and ``KEY VALUE`` overrides.

    Where ``MODEL.DEVICE`` is a GPU and there is none, it becomes "cpu", with a line on stderr.

    Raises:
        FileNotFoundError: no such config file.
        ValueError: an unknown key, or a value of another type.
    """
    cfg = get_cfg()
    flags = [word for word in overrides[::2] if word.startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} comes after the first KEY VALUE pair: flags go before the pairs")
    if config_file and not os.path.isfile(config_file):
        raise FileNotFoundError(f"--config-file: there is no file {config_file}")
    try:
        if config_file:
            cfg.merge_from_file(config_file)
        cfg.merge_from_list(overrides)
    except (KeyError, AssertionError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise ValueError(f"the config cannot be read: {reason}; keys are listed in spar_d2/config.py") from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print(f"MODEL.DEVICE is {cfg.MODEL.DEVICE} but there is no GPU here: using the CPU.", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def check_gpus(wanted: int) -> None:
    """Raise ``ValueError`` where ``--num-gpus`` asks for several GPUs and there are fewer."""
    present = torch.cuda.device_count()
    if wanted > max(1, present):
        raise ValueError(f"--num-gpus: {wanted} asked for, {present} present; without a GPU leave it at 1")


def prepare(cfg: CfgNode, args: argparse.Namespace, quiet: bool = False) -> None:
    """Freeze the config, make the output folder, set up logging and seeds, as all of Detectron2's tools do.

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
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if quiet and type(handler) is logging.StreamHandler:
            handler.setLevel(logging.WARNING)
    default_setup(cfg, args)


@contextlib.contextmanager
def clean_start(output_dir: str) -> Iterator[None]:
    """While a run is being set up: where that fails, folders made for its output are removed again."""
    path = os.path.abspath(output_dir)
    new = ""
    while path and not os.path.exists(path):
        path, new = os.path.dirname(path), path
    try:
        yield
    except Exception:
        if new and comm.is_main_process():
            logging.shutdown()
            shutil.rmtree(new, ignore_errors=True)
        raise


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit code 1.

    With the environment variable SPAR_TRACEBACK the error is left as it is, to see where it came from.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {error}\n({TRACEBACK_VARIABLE}=1 shows where it came from)", file=sys.stderr)
        raise SystemExit(1) from None
