"""The words to segment: classes, each with one or more synonyms."""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_BUILT_IN = Path(__file__).parent / "vocabularies"
# Their class 0 is what is none of the others: its words say what is usually seen there, and none of them is its name.
_WITH_BACKGROUND = ("voc21", "context60", "coco_object")


class Vocabulary:
    """An ordered list of classes, each with a name and with words to look for.

    Words are compared without regard to case (text encoders read them so), to the number of blanks in them, or to how
    Unicode spells them. No word is in two classes, and every class keeps its first word.

    Args:
        classes: for every class its synonyms, or a single word. Surrounding blanks are removed, empty words and
            classes left out. Dropped with a warning are a word that repeats within its class, and a synonym that is
            the first word of another class or a synonym of an earlier one. A class with the first word of an earlier
            one is merged into it, with a warning.
        names: names of the classes, one for each; default: the first word of each.

    Attributes:
        classes: words of every class.

    Raises:
        ValueError: no class is left, or there are more or fewer names than classes, or two are the same.
    """

    def __init__(self, classes: Iterable[str | Sequence[str]], *, names: Sequence[str] | None = None) -> None:
        lists = [_clean([words] if isinstance(words, str) else words) for words in classes]
        if names is not None:
            _check_names(names, len(lists))
        kept: dict[str, str] = {}
        merged: dict[str, list[str]] = {}
        for number, words in enumerate(lists):
            if not words:
                continue
            first = _folded(words[0])
            if first in merged:
                logger.warning("The vocabulary has the class %r more than once; merged.", words[0])
                merged[first] += words[1:]
            else:
                merged[first] = words
                kept[first] = words[0] if names is None else names[number]
        if not merged:
            raise ValueError("the vocabulary is empty: it must have at least one class with one word")
        self.classes: tuple[tuple[str, ...], ...] = _distinct(merged)
        self._names = tuple(kept.values())

    @staticmethod
    def built_in() -> list[str]:
        """Names of the vocabularies that come with this package, for :meth:`load`."""
        return sorted(path.stem for path in _BUILT_IN.glob("*.txt"))

    @classmethod
    def load(cls, source: str) -> Vocabulary:
        """One that is built in, or from a file, or from text.

        Args:
            source: one of :meth:`built_in`; or path of a UTF-8 file with one class per line and synonyms separated by
                ", "; or inline text with ";" or new lines between classes and "," between synonyms
                ("cat, kitten; dog; sky").

        Raises:
            FileNotFoundError: ``source`` looks like a path (ends in ".txt", or begins with "/", "./" or "../") and is
                not there.
            ValueError: nothing in it, or a file that is not UTF-8.
        """
        if source in cls.built_in():
            classes = _read(_BUILT_IN / f"{source}.txt")
            names = ["background", *(words[0] for words in classes[1:])] if source in _WITH_BACKGROUND else None
            return cls(classes, names=names)
        like_path = source.endswith(".txt") or source.startswith(("/", "./", "../"))
        if like_path or (not re.search("[;,\n]", source) and os.path.isfile(source)):
            return cls.from_file(source)
        if not re.search("[;,\n]", source.strip()) and source.strip():
            near = difflib.get_close_matches(source.lower(), cls.built_in(), n=1)
            hint = f"; did you mean the built-in {near[0]!r}?" if near else ""
            logger.warning("The vocabulary is the one class %r, which every pixel gets%s", source, hint)
        try:
            return cls(part.split(",") for part in re.split("[;\n]", source))
        except ValueError as error:
            raise ValueError(f"{error}; got {source!r}") from error

    @classmethod
    def of(cls, words: Vocabulary | str | Iterable[str | Sequence[str]]) -> Vocabulary:
        """A vocabulary as it is, text as :meth:`load` takes it, or classes as the constructor does; raises as they."""
        if isinstance(words, Vocabulary):
            return words
        return cls.load(words) if isinstance(words, str) else cls(words)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Vocabulary:
        """From a UTF-8 file: one class per line, synonyms separated by ", ". Raises as :meth:`load`."""
        classes = _read(path)
        try:
            return cls(classes)
        except ValueError as error:
            raise ValueError(f"{error}; got the file {path}") from error

    @property
    def names(self) -> list[str]:
        """Name of every class."""
        return list(self._names)

    @property
    def queries(self) -> list[str]:
        """All words, class by class."""
        return [word for words in self.classes for word in words]

    @property
    def query_class(self) -> list[int]:
        """For every query the number of its class."""
        return [index for index, words in enumerate(self.classes) for _ in words]

    def __len__(self) -> int:
        return len(self.classes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.classes, self._names) == (other.classes, other._names)

    def __hash__(self) -> int:
        return hash((self.classes, self._names))

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} classes: {'; '.join(self.names[:5])}{', ...' if len(self) > 5 else ''})"


def _read(path: str | os.PathLike) -> list[list[str]]:
    """Words of every line of a file, as :meth:`Vocabulary.from_file`."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"there is no vocabulary file {path}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the vocabulary file {path} is not UTF-8: {error}") from error
    return [line.split(", ") for line in lines]


def _check_names(names: Sequence[str], count: int) -> None:
    if len(names) != count:
        raise ValueError(f"names must be one for each of the {count} classes, got {len(names)}")
    if len({_folded(name) for name in names}) < count:
        raise ValueError(f"names must be different from each other, got {list(names)}")


def _clean(words: Iterable[str]) -> list[str]:
    words = (unicodedata.normalize("NFC", word).strip() for word in words)
    return [word for word in words if word]


def _folded(word: str) -> str:
    """What two words share that count as one."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", word).casefold()).split())


def _distinct(merged: dict[str, list[str]]) -> tuple[tuple[str, ...], ...]:
    """The words of every class, by its folded first word, less those that another class has."""
    owners = {first: words[0] for first, words in merged.items()}
    classes = []
    for words in merged.values():
        kept = words[:1]
        for word in words[1:]:
            owner = owners.setdefault(_folded(word), words[0])
            if owner != words[0]:
                logger.warning("The word %r of the class %r is dropped: the class %r has it.", word, words[0], owner)
            elif _folded(word) in map(_folded, kept):
                logger.warning("The word %r is in the class %r more than once; dropped.", word, words[0])
            else:
                kept.append(word)
        classes.append(tuple(kept))
    return tuple(classes)
