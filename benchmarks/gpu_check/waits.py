"""Counts synchronizations of the host with the GPU, as reported by PyTorch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch

from benchmarks.gpu_check.checks import FACTS, Fact
from benchmarks.gpu_check.record import Record

# Text of the warnings that torch.cuda.set_sync_debug_mode enables.
_WAIT = "called a synchronizing"


class HostWaits:
    """Counts synchronizations within a block, except calls of ``torch.cuda.synchronize``.

    Attributes:
        places: number of synchronizations by file and line; empty on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.places: Counter = Counter()
        self._on_gpu = device.type == "cuda"
        self._warnings = warnings.catch_warnings(record=True)

    def __enter__(self) -> HostWaits:
        self._caught = self._warnings.__enter__()
        warnings.simplefilter("always")
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)
        waits = [caught for caught in self._caught if _WAIT in str(caught.message)]
        self.places.update(f"{wait.filename}:{wait.lineno}" for wait in waits)


def check_waits(record: Record, subject: str, call: Callable[[], object], device: torch.device, limit: int) -> None:
    """Check that a call synchronizes at most ``limit`` times after a warm-up; does nothing on a CPU."""
    if device.type != "cuda":
        return
    call()
    torch.cuda.synchronize(device)
    with HostWaits(device) as waits:
        call()
    number = sum(waits.places.values())
    where = ", ".join(f"{place} ({count})" for place, count in waits.places.items())
    fact = Fact(subject, f"the host waits {limit} times at most", f"{number} {where}".strip(), number <= limit)
    record.add("Waits of the host", FACTS, fact)
