"""Events on the pretended device, by file and line of the calling code."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import os
import sys

import torch

# Code that is responsible for an event: the innermost of these packages in the stack.
_PACKAGES = ("spar_d2", "detectron2")


class Record:
    """Events on the pretended device, counted by kind and place ("spar_d2/engine/train_step.py:95")."""

    def __init__(self) -> None:
        self.waits, self.copies, self.launches = (collections.Counter() for _ in range(3))
        self.attention, self.unordered, self.bytes_copied = (collections.Counter() for _ in range(3))
        self._roots = {}
        for package in _PACKAGES:
            spec = importlib.util.find_spec(package)
            if spec is not None:
                self._roots[os.path.dirname(spec.origin) + os.sep] = package
        self._ignored = (
            os.path.dirname(torch.__file__) + os.sep,
            os.path.dirname(__file__) + os.sep,
            contextlib.__file__,
        )
        self._owner = functools.cache(self._find_owner)

    def reset(self) -> None:
        """Forget all events so far, such as those of building models."""
        for counter in (self.waits, self.copies, self.launches, self.attention, self.unordered, self.bytes_copied):
            counter.clear()

    def waits_in(self, package: str = "spar_d2") -> int:
        """How often the CPU waited because code of a package asked for it, itself or through a library."""
        return sum(count for (_, place), count in self.waits.items() if place.startswith(f"{package}/"))

    def attention_by(self, backend: str) -> int:
        """How often attention went through a kernel: "flash", "efficient" or "MATH"."""
        return sum(count for (what, _), count in self.attention.items() if what.startswith(backend))

    def report(self, top: int = 20) -> str:
        """All of it as text, the most frequent first."""
        lines = [f"{self.launches.total()} launches, {self.waits.total()} waits, {self.copies.total()} copies"]
        lines[0] += f" ({self.bytes_copied.total() / 1e6:.3f} MB)"
        titles = ("wait", "copy", "attention", "unordered", "launch")
        for title, counter in zip(titles, (self.waits, self.copies, self.attention, self.unordered, self.launches)):
            lines += [f"  {title:<9} {n:>5} x {what}, {place}" for (what, place), n in counter.most_common(top)]
        return "\n".join(lines)

    def place(self) -> str:
        """File and line of the innermost code of our packages, or else of any but PyTorch's."""
        frame, outside = sys._getframe(1), None
        while frame is not None:
            owner = self._owner(frame.f_code.co_filename)
            if owner is not None and owner[0] == "@":
                return f"{owner[1:]}:{frame.f_lineno}"
            outside = outside or (owner and f"{owner}:{frame.f_lineno}")
            frame = frame.f_back
        return outside or "?"

    def _find_owner(self, path: str) -> str | None:
        """A file's short name, after "@" where it is to blame; None for those to be skipped."""
        for root, package in self._roots.items():
            if path.startswith(root):
                return f"@{package}/{path.removeprefix(root)}"
        return None if path.startswith(self._ignored) else "/".join(path.split(os.sep)[-2:])
