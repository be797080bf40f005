"""Running a function in two processes that talk to each other, as in distributed training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def run_in_two_processes(function: Callable, folder: Path, *args) -> None:
    """Call ``function(rank, folder, *args)`` in two processes of one gloo group; ``folder`` is for their files."""
    torch.multiprocessing.spawn(_work, (function, folder, *args), nprocs=2)


def _work(rank: int, function: Callable, folder: Path, *args) -> None:
    import torch.distributed as dist
    from detectron2.utils import comm

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    function(rank, folder, *args)
    # A process that leaves while the other is still talking to it can bring that one down.
    (folder / f"done{rank}").touch()
    while not (folder / f"done{1 - rank}").exists():
        time.sleep(0.01)
    os._exit(0)
