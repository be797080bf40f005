"""Inputs of the demo: images and videos, given as files, folders or patterns."""

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
    """An image or a video.

    Attributes:
        record: dataset dict of an image, see :func:`spar_d2.data.images.read_photo`; {"file_name"} for a video.
        name: path relative to the given folder, or file name. Output names are derived from it.
        is_video: whether it is a video.
    """

    record: dict
    name: str
    is_video: bool = False

    @property
    def path(self) -> str:
        return self.record["file_name"]


def find_inputs(words: Sequence[str], output: str | os.PathLike) -> list[Source]:
    """Find the images and videos of ``--input``, without duplicates.

    Args:
        words: files, folders (searched recursively for images and videos), tar files, or patterns such as
            "photos/*.jpg".
        output: output file or folder. Results of earlier runs in it are excluded, if it is inside an input folder.

    Raises:
        FileNotFoundError: there are no inputs.
        ValueError: a folder has no images.
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
        raise FileNotFoundError(f"{FLAG}: there are no images in {' '.join(words)}, except in --output {output}")
    return list(sources.values())


def _sources_of(word: str) -> Iterator[Source]:
    """Yield the inputs of a word. If a pattern has several matches, unusable ones are skipped with a warning."""
    matches = _matches(word)
    for path in matches:
        try:
            yield from _sources_at(path)
        except (ValueError, OSError) as error:
            if len(matches) == 1:
                raise
            logger.warning("skipped: %s", error)


def _fixed_part(word: str) -> str:
    """Return a path, or the folder before the first wildcard of a pattern."""
    path = Path(word)
    while not path.exists() and glob.has_magic(str(path)):
        path = path.parent
    return str(path)


def _matches(word: str) -> list[str]:
    """Return the paths that match a word."""
    if os.path.exists(word):
        return [word]
    if not glob.has_magic(word):
        raise FileNotFoundError(f"{FLAG}: {word} does not exist")
    extensions = (*EXTENSIONS, *VIDEOS, TAR)
    # Path.glob instead of the glob module, whose "**" follows links, including those to a parent folder.
    start = Path(word).anchor
    pattern = f"{word}/*" if word.endswith("**") else word
    paths = sorted(Path(start).glob(os.path.relpath(pattern, start or None)))
    matches = [str(path) for path in paths if path.is_dir() or path.name.lower().endswith(extensions)]
    matches = [
        path
        for path in matches
        if not any(part.startswith(".") and part not in Path(word).parts for part in Path(path).parts)
    ]
    files = [path for path in matches if not os.path.isdir(path)]
    if not matches:
        raise FileNotFoundError(f"{FLAG}: no image, video or folder matches {word}")
    return files or matches


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
    matches = (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in VIDEOS and path.is_file())
    named = ((path, path.relative_to(folder)) for path in matches)
    return [
        Source({"file_name": str(path)}, name.as_posix(), is_video=True)
        for path, name in named
        if not any(part.startswith(".") for part in name.parts)
    ]


def stem_of(name: str) -> str:
    """Return a name without its suffix, as a relative path of the operating system without ".." parts."""
    path = PurePosixPath(name).with_suffix("")
    return str(Path(*(part for part in path.parts if part not in ("/", ".."))))
