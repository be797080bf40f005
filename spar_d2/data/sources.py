"""Finding photos: in folders, tar files and lists. Needs no Detectron2."""

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
_LONGEST_HEADER = 1 << 20
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


@dataclass(frozen=True)
class _File:
    """A photo or tar file, its name within its source, and its real path, by which it is known if met again."""

    path: str
    name: str
    real: str


def find_photos(sources: str | os.PathLike) -> list[dict]:
    """Dataset dicts of all photos that ``SPAR.DATA.IMAGES`` names.

    Photos are jpg, png and webp files; hidden files and folders are left out, and a photo met twice is taken once. Tar
    files are read in place. No photo is opened: a damaged one is found when it is read.

    Args:
        sources: a folder (with all its sub-folders, and the tar files in them), a tar file, a photo, or a list
            (``*.txt`` in UTF-8, one folder, tar file or photo per line, relative to the list's folder); or several of
            them joined by ``os.pathsep``.

    Returns:
        In the order of the sources, and sorted by path within each, {"file_name", "name", "image_id"} for each photo.
        One in a tar file also has "tar", the path of that, and "offset" and "size", its place there in bytes. "name"
        stays the same when a source is moved or other photos are added; photos of two sources may share one.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a source that is none of these or cannot be read, or no photo in any of them.
    """
    sources = os.fspath(sources)
    parts = [sources] if os.path.exists(sources) else [part for part in sources.split(os.pathsep) if part]
    found = [(part, _files(part, os.path.basename(part))) for part in parts]
    tars = sum(_is_tar(file.path) for _, files in found for file in files)
    records, met = [], set()
    with tqdm(total=tars, desc="indexing tar files", disable=None if tars else True, leave=False) as bar:
        for part, files in found:
            before = len(records)
            for file in files:
                if file.real in met:
                    continue
                met.add(file.real)
                if _is_tar(file.path):
                    records += _tar_records(file)
                    bar.update()
                else:
                    records.append({"file_name": file.path, "name": file.name})
            logger.info("%d photos in %s", len(records) - before, part)
    if not records:
        raise ValueError(f"{KEY}: there are no photos ({', '.join(EXTENSIONS)}) in {sources!r}")
    return [{**record, "image_id": index} for index, record in enumerate(records)]


def _is_tar(path: str) -> bool:
    return path.lower().endswith(TAR)


def _files(path: str, name: str, listed: bool = False) -> list[_File]:
    """Photos and tar files of one source, or of a line of a list, which calls a photo by ``name``."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{KEY}: there is no file or folder {path}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    lower = path.lower()
    if stat.S_ISDIR(mode):
        return _files_in_folder(path)
    if lower.endswith(EXTENSIONS):
        return [_File(path, name, os.path.realpath(path))]
    if _is_tar(path):
        if not stat.S_ISREG(mode):
            raise ValueError(f"{KEY}: {path} is no file")
        _check_readable(path)
        return [_File(path, os.path.basename(path), os.path.realpath(path))]
    if lower.endswith(COMPRESSED):
        raise ValueError(f"{KEY}: tar files are read in place, so decompress {path}")
    if lower.endswith(".txt") and stat.S_ISREG(mode) and not listed:
        return _files_in_list(path)
    allowed = f"a folder, a tar file, a photo ({', '.join(EXTENSIONS)})" + ("" if listed else " or a list (.txt)")
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
        more = f"; {len(wrong) - 1} more lines of it are wrong" if len(wrong) > 1 else ""
        raise type(error)(f"{error} (line {number} of {path}){more}") from error
    return files


def _files_in_folder(folder: str) -> list[_File]:
    """Photos and tar files below a folder, sorted by name. Links are followed, but no folder is entered twice."""
    files, linked, compressed = [], [], []
    entered = set()
    # Linked folders come last, and linked files too: a link to what the folder has anyway changes no names.
    waiting = deque([(folder, "")])
    while waiting:
        current, prefix = waiting.pop()
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
            logger.warning("%s: left out the folder %s, which cannot be read: %s", KEY, current, error)
            continue
        for entry in entries:
            name, link = prefix + entry.name, entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (waiting.appendleft if link else waiting.append)((entry.path, f"{name}/"))
            elif entry.name.lower().endswith((*EXTENSIONS, TAR)) and _is_file(entry):
                target = os.path.realpath(entry.path) if link else os.path.join(real, entry.name)
                (linked if link else files).append(_File(entry.path, name, target))
            elif entry.name.lower().endswith(COMPRESSED):
                compressed.append(entry.path)
    if compressed:
        shown = ", ".join(sorted(compressed)[:5]) + (", ..." if len(compressed) > 5 else "")
        logger.warning("%s: left out %d compressed tar files, unpack them to use them: %s", KEY, len(compressed), shown)
    unique = {file.real: file for file in reversed(files + linked)}
    return sorted(unique.values(), key=lambda file: file.name)


def _is_file(entry: os.DirEntry) -> bool:
    """Whether it is a file: reading a pipe might never end. A link to nothing is found when it is read."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or one into a place that may not be read
        return False


def _tar_records(file: _File) -> list[dict]:
    """Dataset dicts, without image_id, of the photos in a tar file, sorted by name."""
    # By name, as unpacking too would keep the last of several of the same name.
    members, damage = {}, ""
    try:
        length = os.path.getsize(file.path)
        with (
            open(file.path, "rb", buffering=0) as raw,
            tarfile.open(fileobj=_Headers(raw), mode="r:", encoding="utf-8") as tar,
        ):
            for member in tar:
                if member.size < 0:  # the next one would lie before it
                    damage = "a member has a negative size"
                    break
                if not member.issparse() and member.offset_data + member.size > length:
                    damage = "it ends within a member"
                elif _is_photo(member):
                    members[posixpath.normpath(member.name)] = member.offset_data, member.size
            if not damage and _has_data(tar):
                damage = "a header in it cannot be read"
    except RecursionError:
        damage = "its headers are nested"
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = str(error)
    if damage:
        logger.warning("%s: the tar file %s is damaged (%s); photos used: %d", KEY, file.path, damage, len(members))
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
    """Of a tar file only headers are read, and a hostile one says that it is gigabytes long."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header in it is {size} bytes long")
        return super().read(size)


def _is_photo(member: tarfile.TarInfo) -> bool:
    """Whether a member of a tar file is a photo, stored as it is (the pieces of a sparse file lie apart)."""
    is_plain = member.isreg() and not member.issparse() and "\0" not in member.name
    if not is_plain or not member.name.lower().endswith(EXTENSIONS):
        return False
    return not any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/"))


def _has_data(tar: tarfile.TarFile) -> bool:
    """Whether there is something where the tar file ends; tarfile takes a damaged header for its end."""
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
