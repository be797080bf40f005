"""Vocabularies with classes that are defined by examples (regions of images), by words, or by both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spar_d2.text.vocabulary import Vocabulary
from spar_d2.utils.io import signature
from spar_d2.utils.yaml_files import read_yaml

_EXAMPLE_KEYS = ("image", "mask", "value", "boxes", "points")
_CLASS_KEYS = ("name", "examples", "words", "clusters")
_FILE_KEYS = ("classes", "clusters", "center")
_MAX_CLUSTERS = 64


@dataclass(frozen=True)
class Example:
    """A region of an image that shows a class.

    Attributes:
        image: image file.
        mask: label map of the size of the image (PNG, TIFF or BMP), or "".
        value: value in ``mask`` that marks the region; None for all values except 0.
        boxes: boxes (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive.
        points: points (x, y) in pixels; each adds the grid cell that contains it.
    """

    image: str
    mask: str = ""
    value: int | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    points: tuple[tuple[float, ...], ...] = ()

    @property
    def files(self) -> list[str]:
        """Image file, and mask file if there is one."""
        return [self.image, *filter(None, [self.mask])]


class ExampleVocabulary(Vocabulary):
    """A vocabulary with examples; use :meth:`Vocabulary.from_examples` to create one.

    Attributes:
        examples: examples of each class; empty for classes that are defined only by words.
        words: class names and synonyms of each class for the text tower; empty for classes that are defined only by
            examples.
        clusters: maximum number of vectors that are computed from the examples of each class.
        center: whether the mean feature of all example images is subtracted from class vectors and dense features.
    """

    def __init__(
        self,
        names: Sequence[str],
        examples: Sequence[Sequence[Example]],
        words: Sequence[Sequence[str]],
        clusters: Sequence[int],
        center: bool,
    ) -> None:
        self.examples = tuple(tuple(one) for one in examples)
        self.clusters = tuple(clusters)
        self.center = center
        self._files = tuple((file, signature(file)) for one in self.examples for e in one for file in e.files)
        super().__init__([[*synonyms] or [name] for name, synonyms in zip(names, words)], names=names)
        self.words = tuple(kept if given else () for kept, given in zip(self.classes, words))

    @property
    def files(self) -> list[str]:
        """Image files of all examples, each once, without masks."""
        return list(dict.fromkeys(example.image for examples in self.examples for example in examples))

    def _state(self) -> tuple:
        return self._names, self.classes, self.examples, self.clusters, self.center, self._files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExampleVocabulary) and self._state() == other._state()

    def __hash__(self) -> int:
        return hash(self._state())


def load_examples(path: str | os.PathLike) -> ExampleVocabulary:
    """Load an examples file (YAML); see :meth:`Vocabulary.from_examples`. Its paths are relative to its folder.

    Raises:
        FileNotFoundError: the file does not exist, or an image or mask that it names does not.
        ValueError: the file is not valid; the message names the entry.
    """
    path = Path(path)
    try:
        content = read_yaml(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"examples: {error}") from error
    try:
        _check_keys(content, _FILE_KEYS, "the file")
        settings = content.get("clusters", 1), content.get("center", False)
        return parse_examples(content.get("classes"), *settings, path.parent)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{path}: {error}") from error


def parse_examples(
    classes: object, clusters: object = 1, center: object = False, folder: str | os.PathLike = "."
) -> ExampleVocabulary:
    """Create a vocabulary from classes with examples, after validation; see :meth:`Vocabulary.from_examples`.

    Paths are relative to ``folder``.
    """
    if isinstance(classes, Mapping):
        classes = [{"name": name, "examples": examples} for name, examples in classes.items()]
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not classes:
        raise ValueError(f"classes must be a list of classes, each with name and examples or words; got {classes!r}")
    if not isinstance(center, bool):
        raise ValueError(f"center must be true or false, got {center!r}")
    names, examples, words, counts = [], [], [], []
    for number, entry in enumerate(classes):
        where = f"class {number}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} must have the keys {', '.join(_CLASS_KEYS)}; got {entry!r}")
        _check_keys(entry, _CLASS_KEYS, where)
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: name must be a string, got {name!r}")
        where = f"class {name!r}"
        names.append(name.strip())
        listed = entry.get("examples", [])
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise ValueError(f"{where}: examples must be a list, got {listed!r}")
        found = [_example(one, f"{where}, example {index}", Path(folder)) for index, one in enumerate(listed)]
        for other, earlier in zip(names, examples):
            if both := set(found) & set(earlier):
                image = next(iter(both)).image
                raise ValueError(f"{where}: examples has a region of {image} that is also an example of {other!r}")
        examples.append(found)
        synonyms = entry.get("words", [])
        # As in inline vocabularies, "cat, kitten" is two words.
        synonyms = [word.strip() for word in synonyms.split(",")] if isinstance(synonyms, str) else synonyms
        if not isinstance(synonyms, Sequence) or not all(isinstance(word, str) and word.strip() for word in synonyms):
            raise ValueError(f"{where}: words must be a list of strings, got {synonyms!r}")
        words.append(list(synonyms))
        if not listed and not synonyms:
            raise ValueError(f"{where} must have examples or words")
        counts.append(_count(entry.get("clusters", clusters), f"{where}: clusters"))
    if center and any(words):
        raise ValueError("center must be false if classes have words: text embeddings cannot be centered")
    return ExampleVocabulary(names, examples, words, counts, center)


def _example(entry: object, where: str, folder: Path) -> Example:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must have the keys {', '.join(_EXAMPLE_KEYS)}; got {entry!r}")
    _check_keys(entry, _EXAMPLE_KEYS, where)
    files = {}
    for key in ("image", "mask"):
        file = entry.get(key, "")
        if not isinstance(file, (str, os.PathLike)) or (key == "image" and not file):
            raise ValueError(f"{where}: {key} must be a file, got {file!r}")
        files[key] = str(folder / file) if file else ""
        if file and not os.path.isfile(files[key]):
            raise FileNotFoundError(f"{where}: {key}: there is no file {files[key]}")
    boxes, points = _shapes(entry, "boxes", 4, where), _shapes(entry, "points", 2, where)
    if any(x0 >= x1 or y0 >= y1 for x0, y0, x1, y1 in boxes):
        raise ValueError(f"{where}: boxes must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {list(boxes)}")
    if not (files["mask"] or boxes or points):
        raise ValueError(f"{where} must have a mask, boxes or points")
    value = entry.get("value")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0 or not files["mask"]):
        raise ValueError(f"{where}: value must be a value of the mask, an integer from 0; got {value!r}")
    return Example(files["image"], files["mask"], value, boxes, points)


def _shapes(entry: Mapping, key: str, length: int, where: str) -> tuple[tuple[float, ...], ...]:
    shapes = entry.get(key, [])
    plain = isinstance(shapes, Sequence) and all(isinstance(s, Sequence) and len(s) == length for s in shapes)
    if not plain or not all(isinstance(v, (int, float)) and -1e6 < v < 1e6 for shape in shapes for v in shape):
        raise ValueError(f"{where}: {key} must be a list of lists of {length} numbers in pixels, got {shapes!r}")
    return tuple(tuple(float(v) for v in shape) for shape in shapes)


def _count(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_CLUSTERS:
        raise ValueError(f"{what} must be an integer in 1..{_MAX_CLUSTERS}, got {value!r}")
    return value


def _check_keys(entry: Mapping, allowed: Sequence[str], where: str) -> None:
    if unknown := [key for key in entry if key not in allowed]:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}")
