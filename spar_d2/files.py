"""Writing files so that a half-written one is never seen."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

# A temporary name says who writes to it: ".student.HOST-PID-RANDOM.tmp.safetensors".
_TEMPORARY = re.compile(r"\..*\.(?P<host>[^.]*)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp(\.|$)")
_STALE_SECONDS = 24 * 3600
# What this process writes is younger; times of files may lie a little behind.
_STARTED = time.time() - 1


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it takes the place of ``path`` when the block ends well.

    The folder is made if needed. When the block fails, nothing is left and ``path`` is as it was. Several processes may
    write the same ``path`` at once: one of them wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, for writers that choose a format by it.
    owner = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.stem}.{owner}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # Some writers make files that only their owner may read.
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def used_by_one(folder: str | os.PathLike) -> Iterator[None]:
    """Within it, no other process can enter it for the same folder; where locks are not supported, any can.

    Raises:
        RuntimeError: another process is within it.
    """
    with open(Path(folder) / ".lock", "w") as file:
        try:
            # Of this process alone: what it forks does not hold on to it.
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RuntimeError(f"OUTPUT_DIR {folder} is in use by another run; choose another folder") from error
        except OSError:  # a file system without locks
            pass
        yield


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Remove temporary files that writers which were killed left in a folder or below it; returns their paths.

    Those of processes that still run, here or within the last day on another machine, are left alone.
    """
    removed = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if (match := _TEMPORARY.match(name)) and _is_stale(path, match["host"], int(match["pid"])):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    removed.append(path)
    return removed


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


def _is_stale(path: str, host: str, pid: int) -> bool:
    latest = time.time() - _STALE_SECONDS
    if host == _host():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it runs, as another user
            pass
        if pid == os.getpid():
            # In a container that is started again, a process may have the number that the killed one had.
            latest = _STARTED
    try:
        return os.path.getmtime(path) < latest
    except OSError:
        return False
