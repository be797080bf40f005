"""What the demo is given: photos and videos, by name, pattern or folder."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spar_d2.data.sources import EXTENSIONS, KEY, TAR, find_photos

logger = logging.getLogger(__name__)

FLAG = "--input"
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv")


@dataclass(frozen=True)
class Source:
    """A photo or a video.

    Attributes:
        record: the photo's dataset dict, as :func:`spar_d2.data.images.read_photo` takes it; of a video "file_name".
        name: its path within the folder that was given, or else its file name; outputs are called after it.
        is_video: whether it is one.
    """

    record: dict
    name: str
    is_video: bool = False

    @property
    def path(self) -> str:
        return self.record["file_name"]


def find_inputs(words: Sequence[str], output: str | os.PathLike) -> list[Source]:
    """Photos and videos that the words of ``--input`` name, each once.

    Args:
        words: files, folders (photos and videos in them and their sub-folders), tar files, or patterns such as
            "photos/*.jpg".
        output: file or folder to be written to; what earlier runs left there, below a word's folder, is no input.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder without photos.
    """
    written = Path(os.path.realpath(output))
    sources: dict[str, Source] = {}
    for word in words:
        skips = not Path(os.path.realpath(_fixed_part(word))).is_relative_to(written)
        for source in _sources_of(word):
            real = os.path.realpath(source.path)
            if not (skips and Path(real).is_relative_to(written)):
                sources.setdefault(real, source)
    if not sources:
        raise FileNotFoundError(f"{FLAG}: there are no photos in {' '.join(words)} but those in --output {output}")
    return list(sources.values())


def _sources_of(word: str) -> Iterator[Source]:
    """What a word names; of several matches of a pattern, one that cannot be used is told and left out."""
    matches = _matches(word)
    for path in matches:
        try:
            yield from _sources_at(path)
        except (ValueError, OSError) as error:
            if len(matches) == 1:
                raise
            logger.warning("left out: %s", error)


def _fixed_part(word: str) -> str:
    """A path, or the folder that a pattern begins with."""
    path = Path(word)
    while not path.exists() and glob.has_magic(str(path)):
        path = path.parent
    return str(path)


def _matches(word: str) -> list[str]:
    """Paths that a word stands for."""
    if os.path.exists(word):
        return [word]
    if not glob.has_magic(word):
        raise FileNotFoundError(f"{FLAG}: there is no file or folder {word}")
    known = (*EXTENSIONS, *VIDEOS, TAR)
    # Not by the module glob, whose "**" enters links, also those to a folder above.
    start = Path(word).anchor
    pattern = f"{word}/*" if word.endswith("**") else word
    paths = sorted(Path(start).glob(os.path.relpath(pattern, start or None)))
    found = [str(path) for path in paths if path.is_dir() or path.name.lower().endswith(known)]
    found = [
        path
        for path in found
        if not any(part.startswith(".") and part not in Path(word).parts for part in Path(path).parts)
    ]
    files = [path for path in found if not os.path.isdir(path)]
    if not found:
        raise FileNotFoundError(f"{FLAG}: no photo, video or folder matches {word}")
    return files or found


def _sources_at(path: str) -> list[Source]:
    if not (os.path.isdir(path) or path.lower().endswith(TAR)):
        return [Source({"file_name": path}, os.path.basename(path), path.lower().endswith(VIDEOS))]
    videos = _videos_below(path) if os.path.isdir(path) else []
    try:
        photos = [Source(record, record["name"]) for record in find_photos(path)]
    except (ValueError, OSError) as error:
        if videos:
            return videos
        raise type(error)(str(error).replace(KEY, FLAG)) from error
    return [*photos, *videos]


def _videos_below(folder: str) -> list[Source]:
    found = (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in VIDEOS and path.is_file())
    named = ((path, path.relative_to(folder)) for path in found)
    return [
        Source({"file_name": str(path)}, name.as_posix(), is_video=True)
        for path, name in named
        if not any(part.startswith(".") for part in name.parts)
    ]


def stem_of(name: str) -> str:
    """A name without its extension, in the way of this system, never leading out of a folder."""
    path = PurePosixPath(name).with_suffix("")
    return str(Path(*(part for part in path.parts if part not in ("/", ".."))))
