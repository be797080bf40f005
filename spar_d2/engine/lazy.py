"""Training and evaluation of LazyConfigs in the format of Detectron2's model zoo."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import create_ddp_model, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.engine.hooks import PatientWriter
from spar_d2.engine.interrupt import Interrupted, StopOnInterrupt
from spar_d2.engine.setup import clean_start
from spar_d2.engine.solver import count_parameters
from spar_d2.engine.train_step import TrainStep
from spar_d2.utils.errors import make_logs_printable, short_tracebacks

logger = logging.getLogger(__name__)

_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


def is_lazy(config_file: str) -> bool:
    """Return whether a config file is a LazyConfig (``*.py``)."""
    return config_file.endswith(".py")


def load_lazy_config(config_file: str, overrides: list[str]) -> DictConfig:
    """Load a LazyConfig and apply ``key.path=value`` overrides. Code in the config file is executed.

    If ``train.device`` is a GPU but none is available, it is set to "cpu".

    Raises:
        FileNotFoundError: the config file does not exist.
        ValueError: a required entry is missing, or an override is invalid.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"--config-file: there is no file {config_file}")
    invalid = [text for text in overrides if "=" not in text]
    if invalid:
        raise ValueError(f"overrides of a LazyConfig must have the form key.path=value, got {invalid[0]!r}")
    cfg = LazyConfig.load(config_file)
    missing = [part for part in _PARTS if part not in cfg]
    if missing:
        raise ValueError(f"{config_file} must define {', '.join(_PARTS)}; missing: {', '.join(missing)}")
    try:
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except (OmegaConfBaseException, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{config_file}: the overrides {overrides} cannot be read: {error}") from error
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("train.device is %s, but no GPU is available; using the CPU.", cfg.train.device)
        cfg.train.device = "cpu"
    return cfg


def run(args: argparse.Namespace) -> dict | None:
    """Train or, with ``args.eval_only``, evaluate a LazyConfig.

    Args:
        args: parsed arguments of Detectron2's ``default_argument_parser``.

    Returns:
        Scores of the evaluation, or None after training.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    names = {"name": "spar_d2", "abbrev_name": "spar_d2"}
    with clean_start(cfg.train.output_dir, trains=not args.eval_only):
        make_logs_printable(setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), **names))
        default_setup(cfg, args)
        model = instantiate(cfg.model).to(cfg.train.device)
        logger.info("Parameters:\n%s", count_parameters(model))
        if args.eval_only:
            checkpointer = Checkpointer(model, cfg.train.output_dir)
            checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
            return _test(cfg, model)
        trainer, start = _trainer(cfg, model, args.resume)
    logger.info("Output folder: %s", os.path.abspath(cfg.train.output_dir))
    try:
        with short_tracebacks("detectron2.engine.train_loop"):
            trainer.train(start, cfg.train.max_iter)
    except Interrupted as stop:
        logger.info("Training %s", stop)
    return None


def _trainer(cfg: DictConfig, model: nn.Module, resume: bool) -> tuple[TrainStep, int]:
    """Return the trainer and its first iteration."""
    train = cfg.train
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    gpu = next(model.parameters()).is_cuda
    parallel: dict[str, Any] = {**train.ddp, **({} if gpu else {"device_ids": None})}
    model = create_ddp_model(model, **parallel)
    if train.amp.enabled and not gpu:
        logger.warning("train.amp.enabled is ignored without a GPU, where it is slower; training is in float32")
    precision = torch.float16 if train.amp.enabled and gpu else None
    loader = instantiate(cfg.dataloader.train)
    trainer = TrainStep(model, loader, optimizer, precision=precision, scale=precision is torch.float16)
    checkpointer = Checkpointer(model, train.output_dir, trainer=trainer)
    main = comm.is_main_process()
    options = {"max_to_keep": train.checkpointer.max_to_keep}
    periodic = hooks.PeriodicCheckpointer(checkpointer, train.checkpointer.period, **options) if main else None
    writers = default_writers(train.output_dir, train.max_iter) if main else []
    writers = [PatientWriter(writer) for writer in writers]
    evaluation = hooks.EvalHook(train.eval_period, lambda: _test(cfg, model))
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            periodic,
            evaluation,
            # Before the writers: they write again at the end, and would divide by zero elapsed time.
            StopOnInterrupt(checkpointer),
            hooks.PeriodicWriter(writers, period=train.log_period) if main else None,
        ]
    )
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    return trainer, trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0


def _test(cfg: DictConfig, model: nn.Module) -> dict | None:
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results
