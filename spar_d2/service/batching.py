"""A thread that works on what waits: items with the same key and size in one call."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(eq=False)
class _Job:
    key: Hashable
    image: np.ndarray
    future: Future = field(default_factory=Future)

    def fits(self, other: _Job) -> bool:
        return self.key == other.key and self.image.shape == other.image.shape


class Batcher:
    """Calls a function in one thread, in the order of submission, with waiting images of the same key and size.

    Args:
        call: function of a key and a list of images, which returns a list of results.
        max_images, max_pixels: bounds of a batch; a larger image is a batch of its own.
    """

    def __init__(
        self, call: Callable[[Any, list[np.ndarray]], list], max_images: int = 8, max_pixels: int = 2**22
    ) -> None:
        self._call, self._max_images, self._max_pixels = call, max_images, max_pixels
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, image: np.ndarray) -> Future:
        """Submit an image (H, W, 3), and return its future result. The future may be canceled until work begins.

        Raises:
            RuntimeError: the batcher is closed.
        """
        job = _Job(key, image)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Cancel all waiting jobs, and wait for the current one."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._run([job for job in batch if job.future.set_running_or_notify_cancel()])
            # Otherwise, images and results would live until the next request.
            del batch

    def _next(self) -> list[_Job]:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return []
            first = self._jobs[0]
            height, width = first.image.shape[:2]
            room = max(1, min(self._max_images, self._max_pixels // (height * width)))
            batch = [job for job in self._jobs if job.fits(first)][:room]
            for job in batch:
                self._jobs.remove(job)
            return batch

    def _run(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        try:
            results = self._call(jobs[0].key, [job.image for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            # One image must not spoil the others, for example by its need of memory.
            for job in jobs:
                self._run([job])
            return
        for job, result in zip(jobs, results):
            job.future.set_result(result)
