"""Launches the main function of a tool in one or more processes, by its flags or under torchrun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from detectron2.engine import launch
from detectron2.utils import comm

from spar_d2.utils.processes import wait_for_all


def run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call ``main(args)`` in each process.

    Under ``torchrun``, the processes already exist, with or without GPUs. Otherwise, Detectron2's ``launch`` starts
    them according to ``--num-gpus``, ``--num-machines``, ``--machine-rank`` and ``--dist-url``.

    Raises:
        ValueError: the flags are invalid.
    """
    under_torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()
    check_launch(args.num_gpus, args.num_machines, args.machine_rank, under_torchrun)
    if not under_torchrun:
        launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
        return
    with_gpus = torch.cuda.is_available()
    if with_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if with_gpus else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        main(args)
        wait_for_all()
    finally:
        torch.distributed.destroy_process_group()


def check_launch(num_gpus: int, num_machines: int, machine_rank: int, under_torchrun: bool = False) -> None:
    """Raise ``ValueError`` if the flags for several processes are invalid."""
    if under_torchrun and (num_gpus, num_machines, machine_rank) != (1, 1, 0):
        raise ValueError("under torchrun, do not set --num-gpus, --num-machines and --machine-rank")
    available = torch.cuda.device_count()
    if not 0 <= num_gpus <= max(1, available):
        raise ValueError(
            f"--num-gpus must be in 0..{max(1, available)} ({available} GPUs are available), got {num_gpus}; to start "
            "several processes without GPUs, use torchrun"
        )
    if not 0 <= machine_rank < num_machines:
        raise ValueError(f"--machine-rank must be in 0..{num_machines - 1} (--num-machines - 1), got {machine_rank}")
