"""Time and peak memory of function calls, and what machine they ran on."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"


def median_seconds(
    functions: Sequence[Callable[[], object]], repeats: int, device: torch.device, limit: float | None = None
) -> list[float]:
    """Median time of one call of each function.

    The functions take turns, so that a machine that slows down or is busy for a while does so for all of them. On a GPU
    a call ends when its work is done. Warm up before. After ``limit`` seconds none is called again.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    began = time.perf_counter()
    for number in range(repeats):
        if number and limit is not None and time.perf_counter() - began > limit:
            break
        for function, own in zip(functions, seconds):
            _wait_for(device)
            start = time.perf_counter()
            function()
            _wait_for(device)
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that a call takes at once beside what was held before it, its result included.

    On a GPU this is what tensors take. On a CPU it is by how much the process grows, with the buffers of the libraries
    that multiply matrices and with gaps between blocks of memory: tens of MB more, differing from call to call. Warm up
    before: what a library keeps after its first call is not the call's own.

    Returns:
        None where the system does not tell (a CPU without Linux's /proc); the function is not called then.
    """
    if device.type == "cuda":
        _wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_process_peak():
        return None
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def describe_machine(device: torch.device) -> str:
    """Name of the GPU or the processor, and how many threads PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_process_peak() -> bool:
    """Make what the process holds now its peak; False where the system does not let it."""
    if not sys.platform.startswith("linux"):
        return False
    # Memory that was freed but not given back would be taken again without the process growing. C libraries other than
    # glibc have no such function, and keep less.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    # "VmHWM:     1234 kB"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
