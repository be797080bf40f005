"""Functions and tools in separate processes, which start with everything imported."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import PIPE

import torch

# Processes are forked from one that has imported these, which takes seconds, and has started no threads.
multiprocessing.set_forkserver_preload(["open_clip", "timm", "spar_d2.engine.trainer"])


def start_tool(
    tool: Path,
    arguments: Sequence[object],
    log: Path,
    environment: Mapping[str, str],
    folder: Path | None = None,
) -> BaseProcess:
    """Start a script as from a command line, in a separate process group; its output goes to ``log``."""
    given = (str(tool), [str(word) for word in arguments], str(log), {**os.environ, **environment}, folder)
    process = multiprocessing.get_context("forkserver").Process(target=_run_tool, args=given)
    process.start()
    return process


def run_tool(
    tool: Path,
    arguments: Sequence[object],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> int:
    """Run a script to its end, see :func:`start_tool`; returns its exit code."""
    process = start_tool(tool, arguments, log, environment or {}, folder)
    process.join(300)
    return process.exitcode


def _run_tool(tool: str, arguments: list[str], log: str, environment: dict, folder: Path | None) -> None:
    os.setsid()
    if folder:
        os.chdir(folder)
    # As in a script from a command line. Loading workers should not repeat its imports.
    multiprocessing.set_start_method("fork", force=True)
    start = torch.multiprocessing.start_processes
    torch.multiprocessing.start_processes = lambda *args, **keys: start(*args, **{**keys, "start_method": "fork"})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    warnings.simplefilter("ignore")
    sys.argv = [tool, *arguments]
    sys.path.insert(0, os.path.dirname(tool))
    runpy.run_path(tool, run_name="__main__")


def run_in_two_processes(function: Callable, folder: Path, *args) -> None:
    """Call ``function(rank, folder, *args)`` in two processes of one gloo group; ``folder`` is for their files."""
    arguments = (dict(os.environ), torch.get_num_threads(), function, folder, *args)
    torch.multiprocessing.start_processes(_work, arguments, nprocs=2, start_method="forkserver")


def _work(rank: int, environment: dict, threads: int, function: Callable, folder: Path, *args) -> None:
    import torch.distributed as dist
    from detectron2.utils import comm

    os.environ.update(environment)
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    function(rank, folder, *args)
    # A process that leaves while the other is still talking to it can bring that one down.
    (folder / f"done{rank}").touch()
    while not (folder / f"done{1 - rank}").exists():
        time.sleep(0.01)
    os._exit(0)


# Third-party libraries that take time to import and import neither Detectron2 nor this package.
_LIBRARIES = (
    "torch, open_clip, timm, torchvision.ops, fvcore.common.checkpoint, fvcore.transforms.transform, omegaconf, "
    "hydra.errors, pycocotools.mask, matplotlib.pyplot, torch.utils.tensorboard, tabulate, cv2"
)
_FORKS = """
import os, sys
import {libraries}
for line in sys.stdin:
    code, output = eval(line)
    child = os.fork()
    if child == 0:
        sys.stdout = open(output, "w")
        try:
            exec(code, {{"__name__": "__main__"}})
        except BaseException as error:
            print(repr(error))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print(flush=True)
"""


@contextlib.contextmanager
def fresh_process(folder: Path) -> Iterator[Callable[[str], str]]:
    """Yield a function that runs code in a fork of a process without Detectron2 and this package.

    It returns the output of the code, which is also written into ``folder``.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", _FORKS.format(libraries=_LIBRARIES)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment) as process:
        assert process.stdin and process.stdout

        def run(code: str) -> str:
            output = folder / "output.txt"
            process.stdin.write(f"{(code, str(output))!r}\n")
            process.stdin.flush()
            assert process.stdout.readline(), "the process has ended"
            return output.read_text()

        yield run
        process.stdin.close()
