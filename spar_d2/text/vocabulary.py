"""The words to segment: classes, each with one or more synonyms."""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

logger = logging.getLogger(__name__)

_WARNED: set[int] = set()
# Of one kind; more become one line.
_MOST_SAID = 3

_BUILT_IN = Path(__file__).parent / "vocabularies"
# Their class 0 is what is none of the others: its words say what is usually seen there, and none of them is its name.
_WITH_BACKGROUND = ("voc21", "context60", "coco_object")


class Vocabulary:
    """An ordered list of classes, each with a name and with words to look for.

    Classes are never merged and never left out, as their numbers may be those of a data set. Words are compared without
    regard to case (text encoders read them so), to the number of blanks in them, or to how Unicode spells them. No word
    is in two classes: it belongs to the first class that begins with it, or else to the first that has it. A class of
    which no word is left stays as a class without queries, which is never predicted.

    Args:
        classes: for every class its synonyms, or a single word. Surrounding blanks are removed, and empty words left
            out. Words that repeat or belong to another class are dropped, with a warning; another warning names classes
            without queries.
        names: names of the classes, one for each; default: the first word that a class keeps or, where it keeps none,
            its first word, or "". Names of classes with queries are different from each other.

    Attributes:
        classes: words of every class; empty where it has no queries.

    Raises:
        ValueError: no class has a word, an entry is no text, or there are more or fewer names than classes, or two are
            the same.
    """

    def __init__(self, classes: Iterable[str | Sequence[str]], *, names: Sequence[str] | None = None) -> None:
        lists = [_clean(words) for words in _iterated(classes)]
        if names is not None:
            _check_names(names, len(lists))
        if not any(lists):
            raise ValueError("the vocabulary is empty: it must have at least one class with one word")
        dropped: list[str] = []
        self.classes: tuple[tuple[str, ...], ...] = _distinct(lists, dropped)
        if names is None:
            names = [(kept or words or [""])[0] for kept, words in zip(self.classes, lists)]
        self._names = tuple(names)
        self._warn(dropped)

    def _warn(self, dropped: list[str]) -> None:
        """Of a vocabulary once, however often it is made (images may bring their own), and of many words in one line.

        ``dropped`` has a sentence for every word.
        """
        silent = [(number, name) for number, name in enumerate(self._names) if not self.classes[number]]
        found = hash((self, *dropped))
        if found in _WARNED:
            return
        if silent or dropped:
            _WARNED.add(found)
        if len(dropped) > _MOST_SAID:
            first = " ".join(dropped[:_MOST_SAID])
            dropped = [f"{len(dropped)} words of the vocabulary are dropped, as they are there already. {first} ..."]
        for text in dropped:
            logger.warning("%s", text)
        if len(silent) > _MOST_SAID:
            first = ", ".join(f"{number} {name!r}" for number, name in silent[:_MOST_SAID])
            what = "%d classes of the vocabulary have no word that is of no other: none is ever predicted (%s, ...)."
            logger.warning(what, len(silent), first)
            return
        for number, name in silent:
            what = "Class %d of the vocabulary, %r, has no word that is not of another class: it is never predicted."
            logger.warning(what, number, name)

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
                ("cat, kitten; dog; sky"). Blank lines, and nothing between two ";", are no classes.

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
            return cls(_not_blank(part.split(",") for part in re.split("[;\n]", source)))
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
        """From a UTF-8 file: one class per line, none in blank ones, synonyms separated by ", ". Raises as `load`."""
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no vocabulary file {path}")
    try:
        # By line ends alone: other marks of Unicode may stand within a line.
        lines = [line.removesuffix("\r") for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"the vocabulary file {path} is not UTF-8: {error}") from error
    return _not_blank(line.split(", ") for line in lines)


def _not_blank(classes: Iterable[list[str]]) -> list[list[str]]:
    return [words for words in classes if any(word.strip() for word in words)]


def _check_names(names: Sequence[str], count: int) -> None:
    if len(names) != count:
        raise ValueError(f"names must be one for each of the {count} classes, got {len(names)}")
    if len({_folded(name) for name in names}) < count:
        raise ValueError(f"names must be different from each other, got {list(names)}")


def _iterated(classes: object) -> list:
    # The order of a set changes from run to run, and with it the numbers of classes.
    if isinstance(classes, (str, bytes, Set)) or not isinstance(classes, Iterable):
        raise ValueError(f"the vocabulary must be a list of classes, each a word or a list of words; got {classes!r}")
    return list(classes)


def _clean(words: str | Iterable[str]) -> list[str]:
    """The words of one class, without blanks around them, and without empty ones."""
    listed = [words] if isinstance(words, str) else list(words) if isinstance(words, Iterable) else [words]
    if not all(isinstance(word, str) for word in listed):
        raise ValueError(f"a class of the vocabulary must be a word or a list of words, got {words!r}")
    cleaned = (unicodedata.normalize("NFC", word).strip() for word in listed)
    return [word for word in cleaned if word]


def _folded(word: str) -> str:
    """What two words share that count as one."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", word).casefold()).split())


def _distinct(lists: list[list[str]], warnings: list[str]) -> tuple[tuple[str, ...], ...]:
    """The words of every class, less those that another class has; adds to ``warnings`` what is dropped."""
    owners: dict[str, int] = {}
    for number, words in enumerate(lists):
        if words:
            owners.setdefault(_folded(words[0]), number)
    classes = []
    for number, words in enumerate(lists):
        kept: dict[str, str] = {}
        dropped = []
        for word in words:
            owner = owners.setdefault(_folded(word), number)
            if owner != number:
                dropped.append((word, words[0], lists[owner][0]))
            elif _folded(word) in kept:
                warnings.append(f"The word {word!r} is in the class {words[0]!r} more than once; dropped.")
            else:
                kept[_folded(word)] = word
        # Where nothing is left, one warning says it all.
        for word, own, other in dropped if kept else ():
            warnings.append(f"The word {word!r} of the class {own!r} is dropped: the class {other!r} has it.")
        classes.append(tuple(kept.values()))
    return tuple(classes)
