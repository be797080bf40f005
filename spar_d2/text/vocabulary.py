"""Vocabularies for open-vocabulary segmentation: classes, each with one or more synonyms."""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spar_d2.text.examples import ExampleVocabulary

logger = logging.getLogger(__name__)

_WARNED: set[int] = set()
_WARNINGS_KEPT = 10_000
# Maximum number of separate warnings of one kind; more are summarized in one.
_MAX_WARNINGS = 3

_BUILT_IN = Path(__file__).parent / "vocabularies"
# Vocabularies with a background class 0: its synonyms are typical background objects, but it is named "background".
_WITH_BACKGROUND = ("voc21", "context60", "coco_object")


class Vocabulary:
    """An ordered list of classes, each with a name and synonyms.

    Each synonym belongs to one class: to the first class that starts with it, or else to the first class that has it.
    Comparisons ignore case (as text encoders do), repeated spaces, and Unicode normalization. Classes are never merged
    or removed, because their indices may be those of a data set: a class that loses all its synonyms is kept, but never
    predicted.

    Args:
        classes: synonyms of each class, or a single string. Surrounding spaces are removed, and empty synonyms are
            ignored. Repeated synonyms and synonyms of another class are dropped with a warning. Classes without
            synonyms cause another warning.
        names: names of the classes; default: the first remaining synonym, or the first synonym if none remains, or "".
            Default names are unique among classes with synonyms.

    Attributes:
        classes: synonyms of each class; empty for classes that are never predicted.

    Raises:
        ValueError: no class has a synonym, an entry is not a string, or ``names`` has the wrong length or duplicates.
    """

    def __init__(self, classes: Iterable[str | Sequence[str]], *, names: Sequence[str] | None = None) -> None:
        lists = [_clean(synonyms) for synonyms in _iterated(classes)]
        if names is not None:
            _check_names(names, len(lists))
        if not any(lists):
            raise ValueError("the vocabulary is empty: it must have at least one class")
        dropped: list[str] = []
        self.classes: tuple[tuple[str, ...], ...] = _distinct(lists, dropped)
        if names is None:
            names = [(remaining or synonyms or [""])[0] for remaining, synonyms in zip(self.classes, lists)]
        self._names = tuple(names)
        self._warn(dropped)

    def _warn(self, dropped: list[str]) -> None:
        """Log warnings about dropped synonyms and classes without synonyms, once for equal vocabularies.

        Vocabularies may be created for each image, so warnings must not repeat.

        Args:
            dropped: a message for each dropped synonym.
        """
        empty = [(number, name) for number, name in enumerate(self._names) if not self.classes[number]]
        warning_key = hash((self, *dropped))
        if warning_key in _WARNED:
            return
        if empty or dropped:
            if len(_WARNED) >= _WARNINGS_KEPT:
                _WARNED.clear()
            _WARNED.add(warning_key)
        if len(dropped) > _MAX_WARNINGS:
            first = " ".join(dropped[:_MAX_WARNINGS])
            dropped = [f"{len(dropped)} synonyms of the vocabulary are duplicates and dropped. {first} ..."]
        for text in dropped:
            logger.warning("%s", text)
        if len(empty) > _MAX_WARNINGS:
            first = ", ".join(f"{number} {name!r}" for number, name in empty[:_MAX_WARNINGS])
            message = "%d classes of the vocabulary have no synonym of their own and are never predicted (%s, ...)."
            logger.warning(message, len(empty), first)
            return
        for number, name in empty:
            message = "Class %d of the vocabulary, %r, has no synonym of its own and is never predicted."
            logger.warning(message, number, name)

    @staticmethod
    def built_in() -> list[str]:
        """Return the names of the built-in vocabularies."""
        return sorted(path.stem for path in _BUILT_IN.glob("*.txt"))

    @classmethod
    def load(cls, source: str) -> Vocabulary:
        """Load a built-in vocabulary, a file, or inline text.

        Args:
            source: name of a built-in vocabulary; or path of a UTF-8 file with one class per line and synonyms
                separated by ", "; or inline text with classes separated by ";" or newlines and synonyms separated by
                "," ("cat, kitten; dog; sky"). Blank lines and empty classes are ignored. A path that ends in ".yaml" is
                an examples file, see :meth:`from_examples`.

        Raises:
            FileNotFoundError: ``source`` looks like a path (ends in ".txt", or starts with "/", "./" or "../") but does
                not exist.
            ValueError: the vocabulary is empty, or the file is not UTF-8.
        """
        if source in cls.built_in():
            classes = _read(_BUILT_IN / f"{source}.txt")
            names = ["background", *(synonyms[0] for synonyms in classes[1:])] if source in _WITH_BACKGROUND else None
            return cls(classes, names=names)
        if source.lower().endswith((".yaml", ".yml")):
            return cls.from_examples(source)
        is_path = source.endswith(".txt") or source.startswith(("/", "./", "../"))
        if is_path or (not re.search("[;,\n]", source) and os.path.isfile(source)):
            return cls.from_file(source)
        if not re.search("[;,\n]", source.strip()) and source.strip():
            near = difflib.get_close_matches(source.lower(), cls.built_in(), n=1)
            hint = f"; did you mean the built-in {near[0]!r}?" if near else ""
            logger.warning("The vocabulary has only one class, %r, so every pixel is assigned to it%s", source, hint)
        try:
            return cls(cls.split(source))
        except ValueError as error:
            raise ValueError(f"{error}; got {source!r}") from error

    @staticmethod
    def split(text: str) -> list[list[str]]:
        """Split inline text into the synonyms of its classes; see :meth:`load`. Empty classes are left out."""
        return _not_blank(part.split(",") for part in re.split("[;\n]", text))

    @classmethod
    def of(cls, words: Vocabulary | str | os.PathLike | Iterable[str | Sequence[str]]) -> Vocabulary:
        """Convert to a vocabulary: strings as in :meth:`load`, classes as in the constructor, others unchanged.

        Raises the same errors as :meth:`load` and the constructor.
        """
        if isinstance(words, Vocabulary):
            return words
        return cls.load(os.fspath(words)) if isinstance(words, (str, os.PathLike)) else cls(words)

    @staticmethod
    def from_examples(
        classes: str | os.PathLike | Mapping | Sequence, clusters: int = 1, center: bool = False
    ) -> ExampleVocabulary:
        """Define classes by examples (image regions), for encoders without a text tower or classes without a word.

        The vector of a class is the mean of the encoder's dense features inside the regions of its examples.

        Args:
            classes: an examples file (YAML) with the keys "classes", "clusters" and "center"; or a dict from class name
                to examples; or a list of classes. A class is a dict with "name", and "examples" or "words" or both;
                "words" are class names and synonyms for the text tower. An example is a dict with "image" (file), and
                "mask" (label map of the size of the image) with "value" (default: all values except 0), "boxes"
                ([[x0, y0, x1, y1], ...]) or "points" ([[x, y], ...]), in pixels.
            clusters: number of vectors of each class, found by k-means; more than one describes classes that look
                different in different images.
            center: subtract the mean feature of all example images from class vectors and dense features.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: an entry is not valid; the message names it.
        """
        from spar_d2.text.examples import load_examples, parse_examples

        if isinstance(classes, (str, os.PathLike)):
            return load_examples(classes)
        return parse_examples(classes, clusters, center)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Vocabulary:
        """Load a UTF-8 file with one class per line and synonyms separated by ", ". Blank lines are ignored.

        Raises the same errors as :meth:`load`.
        """
        classes = _read(path)
        try:
            return cls(classes)
        except ValueError as error:
            raise ValueError(f"{error}; got the file {path}") from error

    @property
    def names(self) -> list[str]:
        """Names of all classes."""
        return list(self._names)

    @property
    def queries(self) -> list[str]:
        """Synonyms of all classes, in the order of the classes."""
        return [synonym for synonyms in self.classes for synonym in synonyms]

    @property
    def query_class(self) -> list[int]:
        """Class index of each query."""
        return [index for index, synonyms in enumerate(self.classes) for _ in synonyms]

    def __len__(self) -> int:
        return len(self.classes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.classes, self._names) == (other.classes, other._names)

    def __hash__(self) -> int:
        return hash((self.classes, self._names))

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} classes: {'; '.join(self.names[:5])}{', ...' if len(self) > 5 else ''})"


def _read(path: str | os.PathLike) -> list[list[str]]:
    """Read the synonyms in each line of a file, see :meth:`Vocabulary.from_file`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no vocabulary file {path}")
    try:
        # Not splitlines(), which would also split at Unicode separators within a line.
        lines = [line.removesuffix("\r") for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"the vocabulary file {path} is not UTF-8: {error}") from error
    return _not_blank(line.split(", ") for line in lines)


def _not_blank(classes: Iterable[list[str]]) -> list[list[str]]:
    return [synonyms for synonyms in classes if any(synonym.strip() for synonym in synonyms)]


def _check_names(names: Sequence[str], count: int) -> None:
    if len(names) != count:
        raise ValueError(f"names must have one name for each of the {count} classes, got {len(names)}")
    if len({_folded(name) for name in names}) < count:
        raise ValueError(f"names must be unique, got {list(names)}")


def _iterated(classes: object) -> list:
    # Sets are rejected: their order changes between runs, and with it the class indices.
    if isinstance(classes, (str, bytes, Set)) or not isinstance(classes, Iterable):
        raise ValueError(
            f"the vocabulary must be a list of classes, each a string or a list of strings; got {classes!r}"
        )
    return list(classes)


def _clean(synonyms: str | Iterable[str]) -> list[str]:
    """Return the synonyms of a class without surrounding spaces and without empty strings."""
    if isinstance(synonyms, str):
        strings = [synonyms]
    else:
        strings = list(synonyms) if isinstance(synonyms, Iterable) else [synonyms]
    if not all(isinstance(string, str) for string in strings):
        raise ValueError(f"a class of the vocabulary must be a string or a list of strings, got {synonyms!r}")
    if halves := [string for string in strings if re.search("[\ud800-\udfff]", string)]:
        raise ValueError(f"a class name must be Unicode, got half a character in {halves[0]!r}; remove it")
    cleaned = (unicodedata.normalize("NFC", string).strip() for string in strings)
    return [string for string in cleaned if string]


def _folded(text: str) -> str:
    """Normalize case, spaces and Unicode for comparisons."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def _distinct(lists: list[list[str]], warnings: list[str]) -> tuple[tuple[str, ...], ...]:
    """Assign each synonym to one class.

    Args:
        lists: synonyms of each class.
        warnings: list to which a message is appended for each dropped synonym.

    Returns:
        Remaining synonyms of each class.
    """
    owners: dict[str, int] = {}
    for number, synonyms in enumerate(lists):
        if synonyms:
            owners.setdefault(_folded(synonyms[0]), number)
    classes = []
    for number, synonyms in enumerate(lists):
        remaining: dict[str, str] = {}
        dropped = []
        for synonym in synonyms:
            owner = owners.setdefault(_folded(synonym), number)
            if owner != number:
                dropped.append((synonym, synonyms[0], lists[owner][0]))
            elif _folded(synonym) in remaining:
                warnings.append(f"The synonym {synonym!r} of class {synonyms[0]!r} is repeated and dropped.")
            else:
                remaining[_folded(synonym)] = synonym
        # A class without remaining synonyms gets its own warning.
        for synonym, name, other in dropped if remaining else ():
            warnings.append(f"The synonym {synonym!r} of class {name!r} is dropped: it belongs to class {other!r}.")
        classes.append(tuple(remaining.values()))
    return tuple(classes)
