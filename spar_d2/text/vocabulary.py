"""The words to segment: classes, each with one or more synonyms."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


class Vocabulary:
    """An ordered list of classes; the first synonym of a class is its name.

    Args:
        classes: for every class its synonyms, or a single word. Surrounding blanks are removed, empty words and
            classes left out. A word that repeats within its class is dropped; a class of the same name as an earlier
            one is merged into it; both with a warning.

    Raises:
        ValueError: no class is left.
    """

    def __init__(self, classes: Iterable[str | Sequence[str]]) -> None:
        merged: dict[str, list[str]] = {}
        for synonyms in classes:
            words = [word.strip() for word in ([synonyms] if isinstance(synonyms, str) else synonyms)]
            words = [word for word in words if word]
            if not words:
                continue
            if words[0] in merged:
                logger.warning("The vocabulary has the class %r more than once; merged.", words[0])
            known = merged.setdefault(words[0], [])
            for word in words:
                if word not in known:
                    known.append(word)
        if not merged:
            raise ValueError("the vocabulary is empty: it must have at least one class with one word")
        self.classes: tuple[tuple[str, ...], ...] = tuple(tuple(words) for words in merged.values())

    @classmethod
    def load(cls, source: str) -> Vocabulary:
        """From a file, or from text.

        Args:
            source: path of a UTF-8 file with one class per line and synonyms separated by ", "; or inline text with
                ";" or new lines between classes and "," between synonyms ("cat, kitten; dog; sky").

        Raises:
            FileNotFoundError: ``source`` looks like a path (ends in ".txt", or begins with "/", "./" or "../") and is
                not there.
            ValueError: nothing in it, or a file that is not UTF-8.
        """
        if source.endswith(".txt") or source.startswith(("/", "./", "../")):
            return cls.from_file(source)
        try:
            return cls(part.split(",") for part in re.split("[;\n]", source))
        except ValueError as error:
            raise ValueError(f"{error}; got {source!r}") from error

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Vocabulary:
        """From a UTF-8 file: one class per line, synonyms separated by ", ". Raises as :meth:`load`."""
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise FileNotFoundError(f"there is no vocabulary file {path}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"the vocabulary file {path} is not UTF-8: {error}") from error
        try:
            return cls(line.split(", ") for line in lines)
        except ValueError as error:
            raise ValueError(f"{error}; got the file {path}") from error

    @property
    def names(self) -> list[str]:
        """Name of every class."""
        return [words[0] for words in self.classes]

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
        return isinstance(other, Vocabulary) and self.classes == other.classes

    def __hash__(self) -> int:
        return hash(self.classes)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} classes: {'; '.join(self.names[:5])}{', ...' if len(self) > 5 else ''})"
