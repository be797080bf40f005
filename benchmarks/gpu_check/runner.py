"""Runs the parts, each in a process of its own with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.gpu_check.parts import MINUTES, Part
from benchmarks.gpu_check.settings import ROOT

# How long a process that was asked to end has for it.
_GRACE = 10.0
_TICK = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        state: "ran", "failed" (its process did), "cut" (by the time limit) or "stopped" (by Ctrl-C).
        seconds: that it took.
    """

    part: Part
    state: str
    seconds: float


class Runner:
    """Runs parts one after the other.

    Args:
        output: folder for everything; a part writes NAME.json and NAME.log.
        device: "cuda", or "cpu" to try the check itself.
        is_small: everything once, as small as it can be.
        minutes: for all parts of the check together; what one leaves over is there for those after it.
    """

    def __init__(self, output: Path, device: str = "cuda", is_small: bool = False, minutes: float = MINUTES) -> None:
        self.output, self.device, self.is_small = output, device, is_small
        self.minutes = minutes

    def run(self, parts: Sequence[Part]) -> list[Outcome]:
        """Run the parts; Ctrl-C ends the one that runs, and leaves out those after it."""
        self.output.mkdir(parents=True, exist_ok=True)
        for part in parts:
            # What an earlier check left would look like this one's.
            self._file(part, "json").unlink(missing_ok=True)
        outcomes: list[Outcome] = []
        limits = [part.seconds * self.minutes / MINUTES for part in parts]
        deadline = started = time.monotonic()
        for number, (part, limit) in enumerate(zip(parts, limits)):
            deadline += limit
            left = deadline - time.monotonic()
            print(f"[{number + 1}/{len(parts)}] {part.name}: {part.about}; up to {left:.0f} s", flush=True)
            outcomes.append(self._run(part, left))
            ended = outcomes[-1]
            print(f"    {ended.state} after {ended.seconds:.0f} s", end="", flush=True)
            to_go = started + sum(limits) - time.monotonic() if part is not parts[-1] else 0
            print(f" (log: {self._file(part, 'log')}); at most {to_go / 60:.1f} min to go", flush=True)
            if ended.state == "stopped":
                break
        return outcomes

    def _file(self, part: Part, suffix: str) -> Path:
        return self.output / f"{part.name}.{suffix}"

    def _run(self, part: Part, limit: float) -> Outcome:
        command = [sys.executable, "-m", "benchmarks.gpu_check", part.name, "--output", str(self.output.resolve())]
        command += ["--device", self.device, *(["--small"] if self.is_small else [])]
        started = time.monotonic()
        with open(self._file(part, "log"), "wb") as log:
            # In a group of its own: Ctrl-C reaches this process alone, and all processes of a part end together.
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            code = _wait(process, limit)
            state = "cut" if code is None else "failed" if code else "ran"
        except KeyboardInterrupt:
            state = "stopped"
        finally:
            _end(process)
        return Outcome(part, state, time.monotonic() - started)


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    """The exit code; None where the time was over before."""
    started = time.monotonic()
    with tqdm(total=round(limit), unit="s", leave=False, disable=None) as progress:
        while (passed := time.monotonic() - started) < limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(_TICK, limit - passed))
            progress.update(int(passed) - progress.n)
    return process.poll()


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started, if it still runs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Also where it has ended itself: what it started may still run.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
