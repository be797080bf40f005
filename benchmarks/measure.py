"""Time and peak memory of function calls, and machine information."""

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
    """Measure the median time of each function.

    The functions are called in turn, so that slowdowns of the machine affect all of them. On a GPU, a call ends when
    its work is done. Call the functions once before, to warm up. After ``limit`` seconds, calls are not repeated.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    first_start = time.perf_counter()
    for repeat in range(repeats):
        if repeat and limit is not None and time.perf_counter() - first_start > limit:
            break
        for function, times in zip(functions, seconds):
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Measure the peak memory of a call relative to the memory in use before, including its result.

    On a GPU, this is the memory of tensors. On a CPU, it is the growth of the process, which includes workspaces of
    matrix libraries and fragmentation: tens of MB that vary between calls. Call the function once before, because
    libraries keep memory after their first use.

    Returns:
        Peak memory in bytes, or None if it cannot be measured (on a CPU without Linux's /proc). The function is not
        called then.
    """
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_process_peak():
        return None
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def describe_machine(device: torch.device) -> str:
    """Return the name of the GPU or CPU, and the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_process_peak() -> bool:
    """Reset the peak memory of the process to its current memory; returns False if that is not supported."""
    if not sys.platform.startswith("linux"):
        return False
    # Return freed memory to the system: it could be reused without growing the process. C libraries other than glibc do
    # not have this function, and keep less memory.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def process_bytes(process: int) -> int | None:
    """Return the memory of a process in bytes, or None without Linux's /proc."""
    folder = Path("/proc") / str(process)
    return _status_bytes("VmRSS", folder) if (folder / "status").is_file() else None


def _status_bytes(field: str, process: Path = _PROCESS) -> int:
    lines = (process / "status").read_text().splitlines()
    # "VmHWM:     1234 kB"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
