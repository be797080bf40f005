"""Writing files so that a half-written one is never seen."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

# A temporary name says who writes to it: ".student.HOST-PID-RANDOM.tmp.safetensors".
_TEMPORARY = re.compile(r"\..*\.(?P<host>[^.]*)-\d+-[0-9a-f]{8}\.tmp(\.|$)")
_STALE_SECONDS = 24 * 3600
# Of a name, in bytes; and of a suffix that may still be one of a format.
_LONGEST_NAME, _LONGEST_SUFFIX = 255, 32
_MOST_LINKS = 40
LOCK = ".lock"


def signature(path: str | os.PathLike) -> tuple[int, int]:
    """Size and time of a file, which change with its content; raises ``FileNotFoundError`` where there is none."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to; what is there takes the place of ``path`` when the block ends well.

    The folder is made if needed. When the block fails, nothing is left and ``path`` is as it was. Several processes may
    write the same ``path`` at once: one of them wins. A symbolic link stays, and what it leads to is replaced. Devices
    and named pipes are written to, not replaced.

    Raises:
        OSError: it is a folder, a block device, a socket or a pipe from which nobody reads, or cannot be written.
    """
    target, through = _destination(Path(path))
    # The suffix stays, for writers that choose a format by it.
    suffix = Path(path).suffix
    suffix = suffix if len(os.fsencode(suffix)) <= _LONGEST_SUFFIX else ""
    with (_written_through if through else _replaced)(target, suffix) as temporary:
        yield temporary


def _destination(path: Path) -> tuple[Path, bool]:
    """Where symbolic links lead, and whether that is written to as it is instead of being replaced."""
    given = path
    for _ in range(_MOST_LINKS):
        # What a process has open, such as /dev/stdout: also where it is a file, it is not to be replaced under it.
        opened = str(path.absolute()).startswith(("/proc/", "/dev/fd/"))
        if opened or not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(given))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return path, False
    kinds = {"a folder": stat.S_ISDIR, "a block device": stat.S_ISBLK, "a socket": stat.S_ISSOCK}
    for kind, is_kind in kinds.items():
        if is_kind(mode):
            raise OSError(f"{given} is {kind}, and cannot be written to; name a file")
    return path, opened or not stat.S_ISREG(mode)


@contextlib.contextmanager
def _written_through(path: Path, suffix: str) -> Iterator[Path]:
    descriptor = _open_to_add(path)
    with open(descriptor, "wb") as there, tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / f"content{suffix}"
        yield temporary
        with open(temporary, "rb") as content:
            shutil.copyfileobj(content, there)


def _open_to_add(path: Path) -> int:
    if match := re.fullmatch(rf"(?:/dev|/proc/(?:self|thread-self|{os.getpid()}))/fd/(\d+)", str(path)):
        # What this process has open itself goes on from where it stands.
        return os.dup(int(match[1]))
    try:
        # Without waiting for a reader, which may never come.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(f"{path} is a pipe or socket from which nobody reads; name a file") from error
        raise
    os.set_blocking(descriptor, True)
    return descriptor


@contextlib.contextmanager
def _replaced(path: Path, suffix: str) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _new_temporary(path, suffix)
    try:
        mode = os.stat(path if path.exists() else temporary).st_mode
        yield temporary
        # Some writers make files that only their owner may read.
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _new_temporary(path: Path, suffix: str) -> tuple[Path, int | None]:
    """A new, empty file beside ``path``, and what holds a lock on it, to be closed; None where there are no locks."""
    while True:
        ending = f".{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp{suffix}"
        stem = shortened(path.stem, _LONGEST_NAME - len(os.fsencode(f".{ending}")))
        temporary = path.with_name(f".{stem}{ending}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is None:
            os.close(descriptor)
            return temporary, None
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before it was locked, it may have been taken for a leftover.
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def shortened(name: str, most: int) -> str:
    """The beginning of a name that has no more than so many bytes on disk."""
    while len(os.fsencode(name)) > most:
        name = name[:-1]
    return name


def write_json(content: object, path: str | os.PathLike, **options: Any) -> None:
    """Write :func:`as_json` in UTF-8; readers see all of it or nothing."""
    with atomic_write(path) as temporary:
        temporary.write_text(as_json(content, **options), encoding="utf-8")


def as_json(content: object, **options: Any) -> str:
    """JSON, with the options of ``json.dumps``; numbers that are NaN or infinite, which JSON has not, become null."""
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: object) -> object:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_not_read(output: str | os.PathLike, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Raise ``ValueError`` where ``--output`` would overwrite an input.

    Args:
        output: file to write.
        inputs: file of each flag, or folder whose files are read; None where it is not given.
    """
    real = Path(os.path.realpath(output))
    for flag, source in inputs.items():
        place = Path(os.path.realpath(source)) if source is not None else None
        is_same = place == real or (real.is_file() and place is not None and place.is_file() and real.samefile(place))
        if is_same or (place in real.parents and real.is_file()):
            raise ValueError(f"--output must not overwrite what {flag} {source} is read from, got {output}")


@contextlib.contextmanager
def file_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Within it, no other process can enter it for the same folder; where locks are not supported, any can.

    Raises:
        RuntimeError: another process is within it.
    """
    with open(Path(folder) / LOCK, "w") as file:
        try:
            # Of this process alone: what it forks does not hold on to it.
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RuntimeError(f"OUTPUT_DIR {folder} is in use by another run; choose another folder") from error
        except OSError:  # a file system without locks
            pass
        yield


def mark_in_use(folder: str | os.PathLike) -> Callable[[], bool]:
    """Mark a folder as in use by this process until it ends.

    Returns:
        Tells whether no other process has marked it; False where locks are not supported.
    """
    locks = fcntl
    if locks is None:
        return lambda: False
    # Never closed: the mark ends with the process, however that ends.
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        locks.flock(descriptor, locks.LOCK_SH | locks.LOCK_NB)

    def is_alone() -> bool:
        try:
            locks.flock(descriptor, locks.LOCK_EX | locks.LOCK_NB)
        except OSError:
            return False
        return True

    return is_alone


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Remove temporary files that writers which were killed left in a folder or below it; returns their paths.

    Those that are being written stay: their writer holds a lock on them. Where locks are not supported, and where a
    machine of another name made them, they also stay for a day.
    """
    removed = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if (match := _TEMPORARY.match(name)) and _remove_if_left(path, match["host"]):
                removed.append(path)
    return removed


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


def _remove_if_left(path: str, host: str) -> bool:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb+") as file:
            certain = _is_free(file.fileno()) and host == _host()
            if not certain and time.time() - os.fstat(file.fileno()).st_mtime < _STALE_SECONDS:
                return False
            os.unlink(path)
    except OSError:  # locked, or gone, or not ours to remove
        return False
    return True


def _is_free(descriptor: int) -> bool:
    """Lock a file, which nobody else then can; False where that is not supported. Raises where somebody has."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
