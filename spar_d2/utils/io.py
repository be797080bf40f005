"""Atomic file writes, file locks and JSON."""

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
except ImportError:  # not available on Windows
    fcntl = None

# Files are written in temporary folders, whose names contain host and process, for example
# ".student.HOST-PID-RANDOM.tmp.safetensors". The folder is locked, not the file: some writers, such as safetensors,
# write to a file of their own beside it, and replace it.
_TEMPORARY = re.compile(r"\..*\.(?P<host>[^.]*)-\d+-[0-9a-f]{8}\.tmp(\.|$)")
# Hidden, so that it is never listed as a finished file.
_CONTENT = ".content"
_STALE_SECONDS = 24 * 3600
# Maximum lengths of a file name and of its suffix, in bytes.
_LONGEST_NAME, _LONGEST_SUFFIX = 255, 32
_MOST_LINKS = 40
LOCK = ".lock"


def signature(path: str | os.PathLike) -> tuple[int, int]:
    """Return the file signature: size and modification time. Raises ``FileNotFoundError`` if the file is missing."""
    stat_result = os.stat(path)
    return stat_result.st_size, stat_result.st_mtime_ns


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager that yields a temporary file, which replaces ``path`` if the block succeeds.

    The folder is created if needed. If the block fails, the temporary file is removed, and ``path`` is unchanged.
    If several processes write the same ``path`` concurrently, the last one wins. Symbolic links are followed. Devices
    and named pipes are written to, not replaced.

    Raises:
        OSError: ``path`` is a folder, block device, socket, or pipe without a reader, or is not writable.
    """
    target, through = _destination(Path(path))
    # Keep the suffix, because some writers choose the format by it.
    suffix = Path(path).suffix
    suffix = suffix if len(os.fsencode(suffix)) <= _LONGEST_SUFFIX else ""
    with (_written_through if through else _replaced)(target, suffix) as temporary:
        yield temporary


def _destination(path: Path) -> tuple[Path, bool]:
    """Resolve symbolic links; also return whether to write to the target directly instead of replacing it."""
    given = path
    for _ in range(_MOST_LINKS):
        # Open file descriptors, such as /dev/stdout, must not be replaced, even if they are regular files.
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
            raise OSError(f"{given} is {kind} and cannot be written to; choose a file")
    return path, opened or not stat.S_ISREG(mode)


@contextlib.contextmanager
def _written_through(path: Path, suffix: str) -> Iterator[Path]:
    descriptor = _open_to_add(path)
    with open(descriptor, "wb") as destination, tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / f"content{suffix}"
        yield temporary
        with open(temporary, "rb") as content:
            shutil.copyfileobj(content, destination)


def _open_to_add(path: Path) -> int:
    if match := re.fullmatch(rf"(?:/dev|/proc/(?:self|thread-self|{os.getpid()}))/fd/(\d+)", str(path)):
        # Continue at the current position of a file descriptor of this process.
        return os.dup(int(match[1]))
    try:
        # Non-blocking: do not wait for a reader of the pipe.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(f"{path} is a pipe or socket without a reader; choose a file") from error
        raise
    os.set_blocking(descriptor, True)
    return descriptor


@contextlib.contextmanager
def _replaced(path: Path, suffix: str) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _new_temporary(path, suffix)
    temporary = folder / f"{_CONTENT}{suffix}"
    try:
        temporary.touch()
        mode = os.stat(path if path.exists() else temporary).st_mode
        yield temporary
        # Some writers create files that only the owner can read.
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _new_temporary(path: Path, suffix: str) -> tuple[Path, int | None]:
    """Create a temporary folder beside ``path``, and lock it.

    Returns:
        The folder, and the descriptor that holds the lock until it is closed; None if locks are not supported.
    """
    while True:
        ending = f".{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp{suffix}"
        stem = shortened(path.stem, _LONGEST_NAME - len(os.fsencode(f".{ending}")))
        folder = path.with_name(f".{stem}{ending}")
        folder.mkdir()
        if fcntl is None:
            return folder, None
        # Before it is locked, another process may remove it as a leftover.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def shortened(name: str, most: int) -> str:
    """Truncate a file name to at most ``most`` bytes."""
    while len(os.fsencode(name)) > most:
        name = name[:-1]
    return name


def write_text(text: str, path: str | os.PathLike) -> None:
    """Atomically write a UTF-8 file."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: object, path: str | os.PathLike, **options: Any) -> None:
    """Atomically write :func:`as_json` to a UTF-8 file."""
    write_text(as_json(content, **options), path)


def as_json(content: object, **options: Any) -> str:
    """Serialize with the options of ``json.dumps``. NaN and infinity, which JSON does not support, become null."""
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
    """Raise ``ValueError`` if ``--output`` would overwrite an input.

    Args:
        output: output file.
        inputs: input file or folder of each flag; None if the flag is not set.
    """
    real = Path(os.path.realpath(output))
    for flag, source in inputs.items():
        path = Path(os.path.realpath(source)) if source is not None else None
        is_same = path == real or (real.is_file() and path is not None and path.is_file() and real.samefile(path))
        if is_same or (path in real.parents and real.is_file()):
            raise ValueError(f"--output must not overwrite the input of {flag} {source}, got {output}")


@contextlib.contextmanager
def file_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Context manager that locks a folder for this process. It has no effect if locks are not supported.

    Raises:
        RuntimeError: another process holds the lock.
    """
    with open(Path(folder) / LOCK, "w") as file:
        try:
            # lockf, unlike the flock of the filelock package, is not inherited by data loader workers, which may
            # outlive a killed run.
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RuntimeError(f"OUTPUT_DIR {folder} is in use by another run; choose another folder") from error
        except OSError:  # a file system without locks
            pass
        yield


def mark_in_use(folder: str | os.PathLike) -> Callable[[], bool]:
    """Mark a folder as in use by this process until the process ends.

    Returns:
        A function that returns whether no other process uses the folder; False if locks are not supported.
    """
    locks = fcntl
    if locks is None:
        return lambda: False
    # Never closed: the lock is released when the process ends.
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
    """Recursively remove temporary folders of killed processes from a folder, and return their paths.

    Folders that are being written to are kept, because their writer holds a lock. If locks are not supported, or if the
    folder was created by another host, it is kept for one day.
    """
    removed = []
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(parent, name)
            if (match := _TEMPORARY.match(name)) and _remove_if_left(path, match["host"]):
                removed.append(path)
    return removed


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


def _remove_if_left(path: str, host: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # already removed, or a link
        return False
    try:
        certain = _is_free(descriptor) and host == _host()
        if not certain and time.time() - os.fstat(descriptor).st_mtime < _STALE_SECONDS:
            return False
        shutil.rmtree(path)
    except OSError:  # locked, already removed, or not removable
        return False
    finally:
        os.close(descriptor)
    return True


def _is_free(descriptor: int) -> bool:
    """Try to lock a folder. Returns False if locks are not supported; raises ``BlockingIOError`` if it is locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
