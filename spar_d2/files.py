"""Writing files so that a half-written one is never seen."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

# ".student.RANDOM.tmp.safetensors"; earlier versions had the process before a shorter random part.
_TEMPORARY = re.compile(r"\..*(\.[0-9a-f]{16}|-[0-9a-f]{8})\.tmp(\.|$)")
# Of the name that is replaced; file systems allow 255 bytes, and the random part needs some.
_LONGEST_STEM, _LONGEST_SUFFIX = 128, 32
# Where locks are not supported, a temporary file that is older has no writer any more.
_STALE_SECONDS = 24 * 3600
# Names there stand for what the process has open, which must be written through even where it is a file.
_OPEN_FILES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it takes the place of ``path`` when the block ends well.

    The folder is made if needed. When the block fails, nothing is left and ``path`` is as it was. Several processes may
    write the same ``path`` at once: one of them wins. A symbolic link stays, and the file that it points to is
    replaced. A device or a pipe stays, too: what was written to the temporary name is then copied into it.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: it is a disk.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    if path.is_block_device():
        raise OSError(f"{path} is a disk; name a file to write")
    if path.exists() and (not path.is_file() or path.parent in _OPEN_FILES):
        with _written_through(path) as temporary:
            yield temporary
        return
    if path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_name(path))
    try:
        with contextlib.ExitStack() as locks:
            temporary.touch()
            mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
            locks.enter_context(_locked(temporary))
            yield temporary
            # Some writers put a file of their own in its place, which only its owner may read.
            locks.enter_context(_locked(temporary))
            os.chmod(temporary, mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _written_through(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / f"file{path.suffix}"
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as source, open(path, "ab") as target:
            shutil.copyfileobj(source, target)


def _temporary_name(path: Path) -> str:
    # The suffix stays, for writers that choose a format by it.
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    stem = os.fsencode(path.stem)[:_LONGEST_STEM].decode(errors="ignore")
    return f".{stem}.{secrets.token_hex(8)}.tmp{suffix}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file, which tells :func:`remove_leftovers` of any process that it is being written."""
    with open(path, "rb+") as file:
        _try_lock(file.fileno())
        yield


def _try_lock(file: int) -> bool | None:
    """Lock an open file until it is closed: False where somebody else holds the lock, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        # Of the open file, not of the process: it tells writers of one process apart.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def check_not_read(output: str | os.PathLike, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Raise ``ValueError`` where ``--output`` would overwrite an input.

    Args:
        output: file to write.
        inputs: file of each flag, or folder whose files are read; None where it is not given.
    """
    real = Path(os.path.realpath(output))
    for flag, source in inputs.items():
        place = Path(os.path.realpath(source)) if source is not None else None
        if place == real or (place in real.parents and real.is_file()):
            raise ValueError(f"--output must not overwrite what {flag} {source} is read from, got {output}")


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

    A file that anybody is writing, on this machine or in another container, is locked and left alone. Where the file
    system has no locks, files of the last day are.
    """
    removed = []
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names if _TEMPORARY.match(name)):
            with contextlib.suppress(OSError), open(path, "rb+") as file:
                locked = _try_lock(file.fileno())
                is_old = time.time() - os.fstat(file.fileno()).st_mtime > _STALE_SECONDS
                if locked or (locked is None and is_old):
                    os.unlink(path)
                    removed.append(path)
    return removed
