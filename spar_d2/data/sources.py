"""Finds images in folders, tar files and lists. Needs no Detectron2."""

from __future__ import annotations

import io
import logging
import os
import posixpath
import stat
import tarfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger(__name__)

KEY = "SPAR.DATA.IMAGES"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
TAR = ".tar"
_MAX_HEADER_BYTES = 1 << 20
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


@dataclass(frozen=True)
class _File:
    """An image or tar file: its path, its name within the source, and its real path, to detect duplicates."""

    path: str
    name: str
    real: str


def find_photos(sources: str | os.PathLike) -> list[dict]:
    """Find all images of ``SPAR.DATA.IMAGES``.

    Images are jpg, png and webp files. Hidden files and folders are skipped, and duplicates (the same real path) are
    listed once. Tar files are indexed, not unpacked. Images are not opened: corrupt ones are detected when they are
    read.

    Args:
        sources: a folder (searched recursively, including its tar files), a tar file, an image, or a list (a UTF-8
            ``*.txt`` file with one folder, tar file or image per line, relative to the list's folder); or several of
            these, joined by ``os.pathsep``.

    Returns:
        Dataset dicts {"file_name", "name", "image_id"}, in the order of the sources and sorted by path within a source.
        For images in a tar file, also "tar", the path of the tar file, and "offset" and "size", the position of the
        image in bytes. "name" does not change if a source is moved or images are added. Images of different sources may
        have the same name.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: a source has another format or cannot be read, or there are no images.
    """
    sources = os.fspath(sources)
    parts = [sources] if os.path.exists(sources) else [part for part in sources.split(os.pathsep) if part]
    found = [(part, _files(part, os.path.basename(part))) for part in parts]
    tars = sum(_is_tar(file.path) for _, files in found for file in files)
    records, seen = [], set()
    with tqdm(total=tars, desc="indexing tar files", disable=None if tars else True, leave=False) as bar:
        for part, files in found:
            before = len(records)
            for file in files:
                if file.real in seen:
                    continue
                seen.add(file.real)
                if _is_tar(file.path):
                    records += _tar_records(file)
                    bar.update()
                else:
                    records.append({"file_name": file.path, "name": file.name})
            logger.info("%d images in %s", len(records) - before, part)
    if not records:
        raise ValueError(f"{KEY}: there are no images ({', '.join(EXTENSIONS)}) in {sources!r}")
    return [{**record, "image_id": index} for index, record in enumerate(records)]


def _is_tar(path: str) -> bool:
    return path.lower().endswith(TAR)


def _files(path: str, name: str, listed: bool = False) -> list[_File]:
    """List the images and tar files of a source, or of a line of a list; ``name`` is the name of a single image."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{KEY}: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    lower = path.lower()
    if stat.S_ISDIR(mode):
        return _files_in_folder(path)
    if lower.endswith(EXTENSIONS):
        return [_File(path, name, os.path.realpath(path))]
    if _is_tar(path):
        if not stat.S_ISREG(mode):
            raise ValueError(f"{KEY}: {path} is not a regular file")
        _check_readable(path)
        return [_File(path, os.path.basename(path), os.path.realpath(path))]
    if lower.endswith(COMPRESSED):
        raise ValueError(f"{KEY}: compressed tar files are not supported; decompress {path}")
    if lower.endswith(".txt") and stat.S_ISREG(mode) and not listed:
        return _files_in_list(path)
    allowed = f"a folder, a tar file, an image ({', '.join(EXTENSIONS)})" + ("" if listed else " or a list (.txt)")
    raise ValueError(f"{KEY} must name {allowed}, got {path}")


def _files_in_list(path: str) -> list[_File]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    folder = os.path.dirname(path)
    files, wrong = [], []
    for number, entry in enumerate(map(str.strip, lines), start=1):
        try:
            files += _files(os.path.join(folder, entry), entry, listed=True) if entry else []
        except (OSError, ValueError) as error:
            wrong.append((number, error))
    if wrong:
        number, error = wrong[0]
        more = f"; {len(wrong) - 1} more lines are wrong" if len(wrong) > 1 else ""
        raise type(error)(f"{error} (line {number} of {path}){more}") from error
    return files


def _files_in_folder(folder: str) -> list[_File]:
    """List the images and tar files in a folder, sorted by name. Links are followed, but no folder is entered twice."""
    files, linked, compressed = [], [], []
    entered = set()
    # Links come last, so that a link to something inside the folder does not change any names.
    queue = deque([(folder, "")])
    while queue:
        current, prefix = queue.pop()
        real = os.path.realpath(current)
        if real in entered:
            continue
        entered.add(real)
        try:
            with os.scandir(current) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if current == folder:
                raise _unreadable(folder, error) from error
            logger.warning("%s: skipped the folder %s, which cannot be read: %s", KEY, current, error)
            continue
        for entry in entries:
            name, link = prefix + entry.name, entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (queue.appendleft if link else queue.append)((entry.path, f"{name}/"))
            elif entry.name.lower().endswith((*EXTENSIONS, TAR)) and _is_file(entry):
                target = os.path.realpath(entry.path) if link else os.path.join(real, entry.name)
                (linked if link else files).append(_File(entry.path, name, target))
            elif entry.name.lower().endswith(COMPRESSED):
                compressed.append(entry.path)
    if compressed:
        shown = ", ".join(sorted(compressed)[:5]) + (", ..." if len(compressed) > 5 else "")
        logger.warning("%s: skipped %d compressed tar files, decompress them: %s", KEY, len(compressed), shown)
    unique = {file.real: file for file in reversed(files + linked)}
    return sorted(unique.values(), key=lambda file: file.name)


def _is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a regular file. Reading a pipe might block. Broken links are reported when they are read."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link loop, or a link into an inaccessible folder
        return False


def _tar_records(file: _File) -> list[dict]:
    """Return dataset dicts, without image_id, of the images in a tar file, sorted by name."""
    # Keyed by name: the last of several members with the same name wins, as in unpacking.
    members, damage = {}, ""
    try:
        length = os.path.getsize(file.path)
        with (
            open(file.path, "rb", buffering=0) as raw,
            tarfile.open(fileobj=_Headers(raw), mode="r:", encoding="utf-8") as tar,
        ):
            for member in tar:
                if member.size < 0:  # the next member would start before this one
                    damage = "a member has a negative size"
                    break
                if not member.issparse() and member.offset_data + member.size > length:
                    damage = "it is truncated"
                elif _is_photo(member):
                    members[posixpath.normpath(member.name)] = member.offset_data, member.size
            if not damage and _has_data(tar):
                damage = "it has an unreadable header"
    except RecursionError:
        damage = "its headers are nested too deeply"
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = str(error)
    if damage:
        logger.warning("%s: the tar file %s is corrupt (%s); images used: %d", KEY, file.path, damage, len(members))
    return [
        {
            "file_name": f"{file.path}/{name}",
            "name": f"{file.name}/{name}",
            "tar": file.path,
            "offset": offset,
            "size": size,
        }
        for name, (offset, size) in sorted(members.items())
    ]


class _Headers(io.BufferedReader):
    """Limits the size of reads: only headers are read, and a malicious header may claim to be gigabytes long."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"it has a header of {size} bytes")
        return super().read(size)


def _is_photo(member: tarfile.TarInfo) -> bool:
    """Whether a tar member is an image that is stored contiguously (unlike a sparse file)."""
    is_plain = member.isreg() and not member.issparse() and "\0" not in member.name
    if not is_plain or not member.name.lower().endswith(EXTENSIONS):
        return False
    return not any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/"))


def _has_data(tar: tarfile.TarFile) -> bool:
    """Whether data follows the last member. tarfile mistakes a corrupt header for the end of the file."""
    tar.fileobj.seek(tar.offset)
    return bool(tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"))


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(f"{KEY}: {path} cannot be read: {error}")
