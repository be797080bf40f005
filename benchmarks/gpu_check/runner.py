"""Runs each part in its own process with a time limit."""

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

# Seconds between asking a process to terminate and killing it.
_GRACE = 10.0
_TICK = 0.2


@dataclass(frozen=True)
class Outcome:
    """Outcome of a part.

    Attributes:
        part: the part.
        state: "ran", "failed" (exit code not 0), "cut" (time limit) or "stopped" (Ctrl-C).
        seconds: run time.
    """

    part: Part
    state: str
    seconds: float


class Runner:
    """Runs parts one after the other.

    Args:
        output: output folder; a part writes NAME.json and NAME.log.
        device: "cuda", or "cpu" to test the check itself.
        is_small: use minimal settings.
        minutes: time limit of all parts together; unused time is passed on to later parts.
    """

    def __init__(self, output: Path, device: str = "cuda", is_small: bool = False, minutes: float = MINUTES) -> None:
        self.output, self.device, self.is_small = output, device, is_small
        self.minutes = minutes

    def run(self, parts: Sequence[Part]) -> list[Outcome]:
        """Run parts. Ctrl-C terminates the current part and skips the others."""
        self.output.mkdir(parents=True, exist_ok=True)
        for part in parts:
            # Results of an earlier check could be mistaken for those of this one.
            self._file(part, "json").unlink(missing_ok=True)
        outcomes: list[Outcome] = []
        limits = [part.seconds * self.minutes / MINUTES for part in parts]
        deadline = started = time.monotonic()
        for number, (part, limit) in enumerate(zip(parts, limits)):
            deadline += limit
            remaining = deadline - time.monotonic()
            print(f"[{number + 1}/{len(parts)}] {part.name}: {part.about}; up to {remaining:.0f} s", flush=True)
            outcomes.append(self._run(part, remaining))
            outcome = outcomes[-1]
            print(f"    {outcome.state} after {outcome.seconds:.0f} s", end="", flush=True)
            time_left = started + sum(limits) - time.monotonic() if part is not parts[-1] else 0
            print(f" (log: {self._file(part, 'log')}); at most {time_left / 60:.1f} min to go", flush=True)
            if outcome.state == "stopped":
                break
        return outcomes

    def _file(self, part: Part, suffix: str) -> Path:
        return self.output / f"{part.name}.{suffix}"

    def _run(self, part: Part, limit: float) -> Outcome:
        command = [sys.executable, "-m", "benchmarks.gpu_check", part.name, "--output", str(self.output.resolve())]
        command += ["--device", self.device, *(["--small"] if self.is_small else [])]
        started = time.monotonic()
        with open(self._file(part, "log"), "wb") as log:
            # A separate process group: Ctrl-C reaches only this process, and all processes of a part are terminated
            # together.
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
    """Return the exit code, or None after the time limit."""
    started = time.monotonic()
    with tqdm(total=round(limit), unit="s", leave=False, disable=None) as progress:
        while (passed := time.monotonic() - started) < limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(_TICK, limit - passed))
            progress.update(int(passed) - progress.n)
    return process.poll()


def _end(process: subprocess.Popen) -> None:
    """Terminate a process with all its child processes, if they are still running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Also signal the group of a process that has exited: its children may still run.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
