"""Data-set files: YAML descriptions of the user's own data sets. Needs no Detectron2.

docs/own_data.md describes the format.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from spar_d2.data.datasets.colors import voc_colors
from spar_d2.utils.yaml_files import read_yaml

_KEYS = ("name", "root", "classes", "ignore", "image_name", "label_name", "splits")
_CLASS_KEYS = ("name", "synonyms", "thing", "color", "value")
_SPLIT_KEYS = ("images", "labels", "masks")
# Largest pixel value of label maps and largest category id.
_LARGEST = {False: 2**16 - 1, True: 2**53}
_IGNORED = 255
STEM = "{stem}"
_BACKGROUND = "background"


@dataclass(frozen=True)
class DataClass:
    """A class of a data set.

    Attributes:
        name: name, which is also the first prompt.
        synonyms: further prompts.
        thing: whether it is a thing; None if the file does not say it.
        color: RGB in 0..255; None for a default color.
        value: pixel value in label maps, or category id of panoptic labels; None for the category of this name.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    thing: bool | None = None
    color: tuple[int, int, int] | None = None
    value: int | None = None


@dataclass(frozen=True)
class Split:
    """A split of a data set.

    Attributes:
        name: name of the split.
        images: folders, lists, tar files or images.
        labels: folder of label maps, or JSON file of panoptic labels; "" without labels.
        masks: folder of the panoptic masks; "" without.
    """

    name: str
    images: tuple[str, ...]
    labels: str = ""
    masks: str = ""


@dataclass(frozen=True)
class DatasetFile:
    """Content of a data-set file, with absolute paths.

    Attributes:
        path: path of the file.
        name: name of the data set.
        panoptic: whether the labels are panoptic.
        classes: classes; empty if those of the panoptic JSON files are used.
        ignored: pixel values of label maps that are ignored.
        splits: splits, by name.
        image_name, label_name: name rules with "{stem}"; an empty ``image_name`` stands for any name.
    """

    path: str
    name: str
    panoptic: bool
    classes: tuple[DataClass, ...]
    ignored: tuple[int, ...]
    splits: Mapping[str, Split] = field(hash=False)
    image_name: str = ""
    label_name: str = f"{STEM}.png"

    def registered_name(self, split: str) -> str:
        """Return the name of a split in Detectron2's catalog."""
        return f"{self.name}_{split}"

    @property
    def ignore_label(self) -> int:
        """Label of ignored pixels in the records' label maps."""
        return _IGNORED if len(self.classes) <= _IGNORED else _LARGEST[False]

    def label_values(self) -> tuple[tuple[int, int], ...] | None:
        """Return pairs of pixel value and label for all classes and ignored values; None if values are labels."""
        values = [data_class.value for data_class in self.classes]
        if values == list(range(len(values))) and set(self.ignored) <= {self.ignore_label}:
            return None
        labels = {value: label for label, value in enumerate(values) if value is not None}
        return tuple(sorted({**labels, **dict.fromkeys(self.ignored, self.ignore_label)}.items()))

    def colors(self, given: Sequence[tuple[int, int, int] | None], names: Sequence[str]) -> list[tuple[int, int, int]]:
        """Return a color for each class: the given one, or a default."""
        first = 0 if names and names[0].lower() == _BACKGROUND else 1
        defaults = voc_colors(first + len(names))[first:].tolist()
        return [(red, green, blue) if color is None else color for color, (red, green, blue) in zip(given, defaults)]

    def error(self, key: str, problem: str) -> ValueError:
        """Return an error that names the file and a key."""
        return ValueError(f"{self.path}: {key}: {problem}")

    def not_found(self, key: str, problem: str) -> FileNotFoundError:
        """Return an error on missing files that names the file and a key."""
        return FileNotFoundError(f"{self.path}: {key}: {problem}")


def read_dataset_file(path: str | os.PathLike) -> DatasetFile:
    """Read and validate a data-set file. Images and labels are not accessed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the content is invalid; the message names the file and the key.
    """
    path = Path(path).absolute()
    content = read_yaml(path)
    try:
        return _parse(path, content)
    except _Mistake as mistake:
        raise ValueError(f"{path}: {mistake}") from None


class _Mistake(Exception):
    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")


def _parse(path: Path, content: dict) -> DatasetFile:
    _check_keys("", content, _KEYS)
    name = _text("name", content.get("name", path.stem))
    if not re.fullmatch(r"[\w.-]+", name):
        raise _Mistake("name", f"must have letters, digits, '_', '-' and '.' only, got {name!r}")
    root = path.parent / os.path.expanduser(_text("root", content.get("root", ".")))
    if "splits" not in content:
        raise _Mistake("splits", "is required: a key for each split (train, val), each with images and labels")
    splits = _mapping("splits", content["splits"])
    parsed = {str(split): _split(str(split), part, root) for split, part in splits.items()}
    kinds = {split.labels.endswith(".json") for split in parsed.values() if split.labels}
    if len(kinds) > 1:
        raise _Mistake("splits", "labels must be folders of label maps in all splits, or JSON files in all splits")
    panoptic = kinds == {True}
    if any(split.masks for split in parsed.values()) and not panoptic:
        raise _Mistake("splits", "masks are for panoptic labels only: labels must then be a JSON file")
    if panoptic and (unused := [key for key in ("label_name", "ignore") if key in content]):
        raise _Mistake(unused[0], "is for label maps only; panoptic labels name their files and segments in JSON files")
    classes = _classes(content, panoptic, bool(kinds))
    rules = {key: _rule(key, content[key]) for key in ("image_name", "label_name") if key in content}
    ignored = _ignored(content, classes) if not panoptic else ()
    return DatasetFile(str(path), name, panoptic, classes, ignored, parsed, **rules)


def _classes(content: dict, panoptic: bool, labeled: bool) -> tuple[DataClass, ...]:
    if "classes" not in content:
        if labeled and not panoptic:
            raise _Mistake("classes", "is required: the list of class names, in the order of the pixel values")
        return ()
    listed = content["classes"]
    if not isinstance(listed, list) or not listed:
        raise _Mistake("classes", f"must be a list of at least one class, got {_kind(listed)}")
    classes: list[DataClass] = []
    following = 0
    for index, entry in enumerate(listed):
        parsed = _class(f"classes[{index}]", entry, None if panoptic else following, _LARGEST[panoptic])
        following = (parsed.value or 0) + 1
        classes.append(parsed)
    words: dict[str, str] = {}
    for index, parsed in enumerate(classes):
        for number, word in enumerate((parsed.name, *parsed.synonyms)):
            key = f"classes[{index}].{'synonyms' if number else 'name'}"
            if other := words.get(_folded(word)):
                raise _Mistake(key, f"{word!r} occurs twice, first in {other}; every word belongs to one class")
            words[_folded(word)] = key
    _check_once("classes", [parsed.value for parsed in classes], "value")
    return tuple(classes)


def _class(key: str, entry: object, following: int | None, largest: int) -> DataClass:
    entry = {"name": entry} if not isinstance(entry, dict) else entry
    _check_keys(key, entry, _CLASS_KEYS)
    name = _text(f"{key}.name", entry.get("name"))
    synonyms = entry.get("synonyms", [])
    # As in inline vocabularies, "cat, kitten" is two words.
    synonyms = synonyms.split(",") if isinstance(synonyms, str) else synonyms
    synonyms = synonyms if isinstance(synonyms, list) else [synonyms]
    thing, color, value = (entry.get(part) for part in ("thing", "color", "value"))
    if thing is not None and not isinstance(thing, bool):
        raise _Mistake(f"{key}.thing", f"must be true or false, got {_kind(thing)}")
    if color is not None:
        if not isinstance(color, list) or len(color) != 3 or not all(_is_in(part, 0, 255) for part in color):
            raise _Mistake(f"{key}.color", f"must be [red, green, blue] in 0..255, got {color!r}")
        color = (color[0], color[1], color[2])
    value = following if value is None else value
    if value is not None and not _is_in(value, 0, largest):
        raise _Mistake(f"{key}.value", f"must be an integer in 0..{largest}, got {_kind(value)}")
    words = tuple(_text(f"{key}.synonyms", word) for word in synonyms)
    return DataClass(name, words, thing, color, cast("int | None", value))


def _ignored(content: dict, classes: Sequence[DataClass]) -> tuple[int, ...]:
    values = {parsed.value for parsed in classes}
    if "ignore" not in content:
        return () if _IGNORED in values else (_IGNORED,)
    listed = content["ignore"] if isinstance(content["ignore"], list) else [content["ignore"]]
    for value in listed:
        if not _is_in(value, 0, _LARGEST[False]):
            raise _Mistake("ignore", f"must be pixel values in 0..{_LARGEST[False]}, got {_kind(value)}")
        if value in values:
            raise _Mistake("ignore", f"{value} is also the value of a class; see classes[].value")
    return tuple(listed)


def _split(name: str, part: object, root: Path) -> Split:
    key = f"splits.{name}"
    if not re.fullmatch(r"[\w-]+", name):
        raise _Mistake(key, "names of splits must have letters, digits, '_' and '-' only")
    part = _mapping(key, part)
    _check_keys(key, part, _SPLIT_KEYS)
    images = part.get("images")
    images = images if isinstance(images, list) and images else [images]
    images = tuple(_path(f"{key}.images", one, root) for one in images)
    labels = _path(f"{key}.labels", part["labels"], root) if "labels" in part else ""
    masks = _path(f"{key}.masks", part["masks"], root) if "masks" in part else ""
    if labels.endswith(".json") and not masks:
        masks = labels.removesuffix(".json")
    return Split(name, images, labels, masks)


def _rule(key: str, rule: object) -> str:
    text = _text(key, rule)
    if text.count(STEM) != 1:
        raise _Mistake(key, f"must have {STEM} once, which stands for what the names of an image and its labels share")
    return text


def _path(key: str, value: object, root: Path) -> str:
    return os.path.normpath(root / os.path.expanduser(_text(key, value)))


def _check_keys(where: str, content: Mapping, known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise _Mistake(f"{where}.{key}" if where else str(key), f"unknown key; {hint}")


def _check_once(where: str, values: Iterable[int | None], part: str) -> None:
    first: dict[int, int] = {}
    for index, value in enumerate(values):
        if value in first:
            other = f"{where}[{first[value]}]"
            raise _Mistake(f"{where}[{index}].{part}", f"{value} is already the {part} of {other}")
        if value is not None:
            first[value] = index


def _mapping(key: str, value: Any) -> dict:
    if not isinstance(value, dict) or not value:
        raise _Mistake(key, f"must be a mapping of keys to values, got {_kind(value)}")
    return value


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        quoting = "; quote it" if isinstance(value, bool | int | float) else ""
        raise _Mistake(key, f"must be a string, got {_kind(value)}{quoting}")
    if not value.strip() or "\0" in value:
        raise _Mistake(key, "must not be empty")
    return value.strip()


def _is_in(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _folded(word: str) -> str:
    return " ".join(word.casefold().split())


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    return repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__} {value!r}"[:80]
