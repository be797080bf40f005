"""Processes that a part starts: they see its environment, write to logs of their own, and never outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

# torchrun ends its own processes within 30 seconds.
_PATIENCE = 35


@contextlib.contextmanager
def child(command: Sequence[str], log: Path, cwd: Path | None = None) -> Iterator[subprocess.Popen]:
    """Within it a process runs, whose output goes to a new file; it is ended when the block is left."""
    print("$", *command, f"> {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        # In a session of its own: a signal to the part reaches it once, through `end`.
        process = subprocess.Popen(
            list(command), cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def run_child(command: Sequence[str], log: Path, cwd: Path | None = None) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    with child(command, log, cwd) as process:
        if process.wait():
            last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"exit code {process.returncode} of {' '.join(command)}; its last lines:\n{last}")


def end(process: subprocess.Popen, patience: float = _PATIENCE) -> None:
    """Ask a process to end, and kill it if it does not."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
