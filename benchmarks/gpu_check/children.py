"""Child processes of a part, with their own log files. They never outlive the part."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

# torchrun terminates its own processes within 30 seconds.
_PATIENCE = 35


@contextlib.contextmanager
def child(command: Sequence[str], log: Path, cwd: Path | None = None) -> Iterator[subprocess.Popen]:
    """Run a process whose output goes to a new file; it is terminated at the end of the block."""
    print("$", *command, f"> {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        # A separate session: a signal to the part reaches the child only once, through `end`.
        process = subprocess.Popen(
            list(command), cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def run_child(command: Sequence[str], log: Path, cwd: Path | None = None) -> None:
    """Run a command until it exits.

    Raises:
        RuntimeError: the exit code is not 0.
    """
    with child(command, log, cwd) as process:
        if process.wait():
            last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"exit code {process.returncode} of {' '.join(command)}; its last lines:\n{last}")


def end(process: subprocess.Popen, patience: float = _PATIENCE) -> None:
    """Ask a process to terminate, and kill it after a timeout."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
