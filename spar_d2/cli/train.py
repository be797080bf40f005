"""Distill, train and evaluate with Detectron2's standard flags; supports YAML configs and LazyConfigs (*.py)."""

from __future__ import annotations

import argparse

from detectron2.engine import default_argument_parser

import spar_d2  # noqa: F401  registers
from spar_d2.engine.launch import run
from spar_d2.engine.setup import clean_start, load_config, prepare
from spar_d2.user_modules import import_again
from spar_d2.utils.errors import printable, readable_errors


def main() -> None:
    """Parse the command line and launch one or more processes."""
    parser = default_argument_parser()
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="time a few steps of a distillation, print the expected hours, memory and disk space, and write nothing",
    )
    arguments = parser.parse_args()
    with readable_errors():
        if arguments.dry_run:
            dry_run(arguments)
        else:
            run(work, arguments)


def dry_run(args: argparse.Namespace) -> None:
    """Print the expected costs of a distillation."""
    from spar_d2.engine import lazy
    from spar_d2.engine.dry_run import estimate, report

    if args.eval_only or args.resume or lazy.is_lazy(args.config_file):
        raise ValueError("--dry-run estimates a new distillation of a YAML config, without --eval-only and --resume")
    cfg = load_config(args.config_file, args.opts, trains=True)
    print(printable(report(cfg, estimate(cfg))))


def work(args: argparse.Namespace) -> object:
    """Run training or evaluation in one process."""
    from spar_d2.checkpoint.checkpointer import Checkpointer
    from spar_d2.encoders import DenseEncoder
    from spar_d2.engine import lazy
    from spar_d2.engine.trainer import Trainer
    from spar_d2.probing.trainer import trainer_class

    import_again()
    with readable_errors():
        if lazy.is_lazy(args.config_file):
            return lazy.run(args)
        cfg = load_config(args.config_file, args.opts, trains=not args.eval_only)
        with clean_start(cfg.OUTPUT_DIR, trains=not args.eval_only):
            prepare(cfg, args)
            if args.eval_only:
                if not cfg.DATASETS.TEST:
                    raise ValueError("DATASETS.TEST must not be empty with --eval-only")
                model = Trainer.build_model(cfg)
                Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
                for encoder in (part for part in model.modules() if isinstance(part, DenseEncoder)):
                    encoder.freeze()
                return Trainer.test(cfg, model)
            trainer = trainer_class(cfg)(cfg)
            trainer.resume_or_load(resume=args.resume)
        return trainer.train()
