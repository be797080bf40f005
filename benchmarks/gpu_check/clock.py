"""Time on the device's own clock, which nothing waits for."""

from __future__ import annotations

import time

import torch


class Clock:
    """Adds up what lies between starts and stops.

    Args:
        device: on a GPU, the time that its work takes; on a CPU, that of the calls.
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
        """The sum; waits for the GPU."""
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
