"""Compute teacher targets before training and store them in SPAR.TEACHER.CACHE_DIR.

The images are split among all processes. Targets already in the cache are skipped, so the command can be stopped and
restarted at any time. With --num-machines and --machine-rank, several machines fill one shared folder.
"""

from __future__ import annotations

import argparse
from multiprocessing.queues import SimpleQueue

import torch
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, spawn

import spar_d2  # noqa: F401  registers
from spar_d2.distillation.fill_cache import check_caching, fill_cache
from spar_d2.engine.launch import check_launch
from spar_d2.engine.setup import load_config
from spar_d2.user_modules import import_again
from spar_d2.utils.errors import make_logs_printable, readable_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--config-file", default="", metavar="FILE", help="config file of the training")
    parser.add_argument(
        "--processes",
        type=int,
        default=max(1, gpus),
        help="number of processes on this machine (default: one per GPU, or one)",
    )
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines that fill the folder")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, starting from 0")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override, as in training"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with readable_errors():
        if args.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {args.processes}")
        check_launch(1, args.num_machines, args.machine_rank)
        check_caching(load_config(args.config_file, args.opts))
    reports = get_context("spawn").SimpleQueue()
    if args.processes == 1:
        work(0, args, reports)
    else:
        try:
            spawn(work, (args, reports), args.processes)
        except ProcessExitedException:
            raise SystemExit("error: a process failed (see above); targets in the cache were kept") from None
    for number, report in sorted(reports.get() for _ in range(args.processes)):
        print(f"process {number}: {report}")


def work(number: int, args: argparse.Namespace, reports: SimpleQueue) -> None:
    """Fill the cache from one process.

    Args:
        number: index of the process on this machine.
        args: command line arguments.
        reports: queue that receives ``(number, line of counts)``. Printed here, the line could end up inside the
            progress bar of another process.
    """
    import_again()
    make_logs_printable(setup_logger(name="spar_d2", distributed_rank=number))
    with readable_errors():
        cfg = load_config(args.config_file, args.opts)
        if cfg.MODEL.DEVICE == "cuda":
            cfg.MODEL.DEVICE = f"cuda:{number % torch.cuda.device_count()}"
        elif args.processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // args.processes))
        share, shares = args.machine_rank * args.processes + number, args.num_machines * args.processes
        filled = fill_cache(cfg, share, shares, show=number == 0)
    counts = f"{filled.computed} targets computed, {filled.found} already cached, {filled.damaged} corrupt images"
    reports.put((number, f"{counts}; cache folder: {cfg.SPAR.TEACHER.CACHE_DIR}"))
