"""Reads and validates COCO's panoptic JSON files."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from spar_d2.evaluation.panoptic.quality import VOID, TrueSegment
from spar_d2.utils.id_maps import IDS

_REQUIRED = object()


@dataclass(frozen=True)
class TrueImage:
    """Ground truth of an image: the file name of its PNG within the folder, and its segments."""

    image_id: int | str
    file_name: str
    segments: tuple[TrueSegment, ...]


@dataclass(frozen=True)
class FoundImage:
    """Prediction for an image: the file name of its PNG within the folder, and the category of each segment."""

    file_name: str
    categories: dict[int, int]


@dataclass(frozen=True)
class GroundTruth:
    """Content of a ground truth JSON.

    Attributes:
        folder: folder of the PNGs.
        names: name of each category, in the order of the file.
        things: categories that are things.
        images: annotated images, by id.
    """

    folder: Path
    names: dict[int, str]
    things: frozenset[int]
    images: dict[int | str, TrueImage] = field(repr=False)

    def find(self, image_id: int | str) -> int | str | None:
        """Return the image id in the file; "0012" and 12 are equivalent if unambiguous. None if not found."""
        if image_id in self.images:
            return image_id
        number = _number(image_id)
        same = () if number is None else self._by_number.get(number, ())
        return same[0] if len(same) == 1 else None

    @functools.cached_property
    def _by_number(self) -> dict[int, list[int | str]]:
        by_number: dict[int, list[int | str]] = {}
        for image_id in self.images:
            if (number := _number(image_id)) is not None:
                by_number.setdefault(number, []).append(image_id)
        return by_number


def read_ground_truth(path: str | os.PathLike, folder: str | os.PathLike | None = None) -> GroundTruth:
    """Read and validate a ground truth JSON. Its PNGs are not read.

    Args:
        path: JSON file.
        folder: folder of the PNGs; default: the JSON's name without its suffix.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: the content is not in COCO's format.
    """
    content, folder = _read_json(path, folder)
    names, things = {}, set()
    for where, category in _records(content, "categories", str(path)):
        number = _integer(category, "id", where)
        if number in names:
            raise ValueError(f"{where}: the category {number} is listed more than once")
        names[number] = str(category.get("name", number))
        if _integer(category, "isthing", where) == 1:
            things.add(number)
    images: dict[int | str, TrueImage] = {}
    for where, annotation in _annotations(content, str(path), images):
        segments = tuple(
            TrueSegment(
                *_segment(segment, location), _integer(segment, "iscrowd", location, 0) == 1, _area(segment, location)
            )
            for location, segment in _records(annotation, "segments_info", where)
        )
        images[annotation["image_id"]] = TrueImage(annotation["image_id"], annotation["file_name"], segments)
    return GroundTruth(folder, names, frozenset(things), images)


def read_predictions(
    path: str | os.PathLike, folder: str | os.PathLike | None = None
) -> tuple[Path, dict[int | str, FoundImage]]:
    """Read and validate a prediction JSON; arguments and exceptions as in :func:`read_ground_truth`.

    Returns:
        Folder of the PNGs, and predictions by image id.
    """
    content, folder = _read_json(path, folder)
    images: dict[int | str, FoundImage] = {}
    for where, annotation in _annotations(content, str(path), images):
        categories = {}
        for location, segment in _records(annotation, "segments_info", where):
            number, category = _segment(segment, location)
            if number in categories:
                raise ValueError(f"{where}: the segment {number} is listed more than once")
            categories[number] = category
        images[annotation["image_id"]] = FoundImage(annotation["file_name"], categories)
    return folder, images


def _number(image_id: int | str) -> int | None:
    """Convert an image id to an integer, because data loaders convert names such as "000000000139"."""
    if isinstance(image_id, str):
        return int(image_id) if image_id.isascii() and image_id.isdigit() else None
    return image_id


def _read_json(path: str | os.PathLike, folder: str | os.PathLike | None) -> tuple[dict, Path]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    folder = Path(folder) if folder else path.with_suffix("")
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} with the PNGs of {path} does not exist")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object with the key 'annotations', got {_kind(content)}")
    return content, folder


def _annotations(content: dict, path: str, known: dict) -> Iterator[tuple[str, dict]]:
    """Yield annotations with valid ids and file names, and their names in error messages."""
    for where, annotation in _records(content, "annotations", path):
        image_id = annotation.get("image_id")
        if isinstance(image_id, bool) or not isinstance(image_id, int | str):
            raise ValueError(f"{where}: 'image_id' must be a number or a string, got {_kind(image_id)}")
        where = f"{path}, image {image_id!r}"
        if image_id in known:
            raise ValueError(f"{where}: the image is listed more than once")
        name = annotation.get("file_name")
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"{where}: 'file_name' must be a file name, got {_kind(name)}")
        # Untrusted files must not refer to files outside their folder.
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{where}: 'file_name' must be within the folder of the PNGs, got {name}")
        yield where, annotation


def _records(content: dict, key: str, where: str) -> Iterator[tuple[str, dict]]:
    """Yield the objects of a list, and their names in error messages."""
    if not isinstance(content.get(key), list):
        raise ValueError(f"{where}: {key!r} must be a list, got {_kind(content.get(key))}")
    for index, record in enumerate(content[key]):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {key}[{index}] must be an object, got {_kind(record)}")
        yield f"{where}, {key}[{index}]", record


def _segment(segment: dict, where: str) -> tuple[int, int]:
    """Return the id and category of a segment."""
    number = _integer(segment, "id", where)
    if not VOID < number < IDS:
        raise ValueError(f"{where}: 'id' must be in 1..{IDS - 1} ({VOID} is void), got {number}")
    return number, _integer(segment, "category_id", where)


def _integer(record: dict, key: str, where: str, default: object = _REQUIRED) -> int:
    value = record.get(key, default)
    if not isinstance(value, int):
        raise ValueError(f"{where}: {key!r} must be an integer, got {_kind(value)}")
    return int(value)


def _area(segment: dict, where: str) -> float | None:
    area = segment.get("area")
    if area is not None and not (isinstance(area, int | float) and 0 <= area < 2**53):
        raise ValueError(f"{where}: 'area' must be a number of pixels, got {_kind(area)}")
    return area


def _kind(value: object) -> str:
    if value is None or value is _REQUIRED:
        return "nothing"
    return repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
