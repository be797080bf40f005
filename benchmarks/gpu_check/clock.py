"""Timing with the clock of the device, without synchronization."""

from __future__ import annotations

import time

import torch


class Clock:
    """Sums the times between starts and stops.

    Args:
        device: on a GPU, the time of its work is measured; on a CPU, the time of the calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self._spans: list[tuple] = []

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self._spans.append((self._started, self._now()))

    def seconds(self) -> float:
        """Return the total time. Synchronizes the GPU."""
        if not self._cuda:
            return sum(end - begin for begin, end in self._spans)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
