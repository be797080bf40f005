"""Vocabularies that tell things, whose objects are told apart, from stuff."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from spar_d2.text.vocabulary import Vocabulary

_HEADINGS = ("things", "stuff")
_HEADING = re.compile(rf"(?:^|[;\n])\s*(?:{'|'.join(_HEADINGS)})\s*:", re.IGNORECASE)
_FORM = (
    'a text or file with the headings "things:" and "stuff:" before their classes, such as "things: cat, kitten; dog; '
    'stuff: sky; grass"'
)

Classes = Sequence[str | Sequence[str]]


class PanopticVocabulary:
    """Classes of things and of stuff, things first.

    Args:
        things, stuff: classes, as for :class:`Vocabulary`.
        panoptic: whether things and stuff are told apart. Otherwise, all classes are stuff.

    Attributes:
        vocabulary: all classes.
        things: number of thing classes.

    Raises:
        ValueError: as :class:`Vocabulary`, or there are things although they are not told apart.
    """

    def __init__(self, things: Classes, stuff: Classes, panoptic: bool = True) -> None:
        self.things, self.panoptic = len(things), panoptic
        if self.things and not panoptic:
            raise ValueError(f"the vocabulary must have no things in semantic segmentation, got {self.things}")
        self.vocabulary = Vocabulary([*things, *stuff])

    def __len__(self) -> int:
        return len(self.vocabulary)

    @classmethod
    def of(cls, classes: object, panoptic: bool = True) -> PanopticVocabulary:
        """Convert to a vocabulary.

        Args:
            classes: a :class:`PanopticVocabulary`; a dict with "things" and "stuff", each a list of classes; or, as
                inline text or a UTF-8 file, the heading "things:" or "stuff:" before its classes. Classes are separated
                by ";" or newlines, and synonyms by ",". Without headings, all classes are stuff in semantic
                segmentation, where any form of :meth:`Vocabulary.of` is accepted, too.
            panoptic: whether things and stuff are told apart.

        Raises:
            ValueError: the form is another one, or the vocabulary is empty.
            FileNotFoundError: a file does not exist.
        """
        if isinstance(classes, PanopticVocabulary):
            return classes
        if not panoptic:
            if isinstance(classes, (str, os.PathLike)) and _HEADING.search(text := _text(os.fspath(classes))):
                return cls(*_parsed(text, classes), panoptic=False)
            vocabulary = Vocabulary.of(classes)  # pyright: ignore[reportArgumentType]
            return cls((), [list(synonyms) or [""] for synonyms in vocabulary.classes], panoptic=False)
        if isinstance(classes, Mapping):
            unknown = set(classes) - set(_HEADINGS)
            if not unknown:
                return cls(list(classes.get("things") or ()), list(classes.get("stuff") or ()))
        elif isinstance(classes, (str, os.PathLike)):
            return cls(*_parsed(_text(os.fspath(classes)), classes))
        raise ValueError(f"a panoptic vocabulary must be {_FORM}; or a dict with things and stuff; got {classes!r}")


def _text(source: str) -> str:
    is_path = source.endswith(".txt") or source.startswith(("/", "./", "../"))
    if not is_path:
        return source
    if not Path(source).is_file():
        raise FileNotFoundError(f"there is no vocabulary file {source}")
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the vocabulary file {source} is not UTF-8: {error}") from error


def _parsed(text: str, source: object) -> tuple[list[list[str]], list[list[str]]]:
    found: dict[str, list[list[str]]] = {heading: [] for heading in _HEADINGS}
    section = None
    for entry in re.split("[;\n]", text):
        heading, colon, rest = entry.partition(":")
        if colon and heading.strip().casefold() in _HEADINGS:
            section, entry = found[heading.strip().casefold()], rest
        if not entry.strip():
            continue
        if section is None:
            raise ValueError(f"a panoptic vocabulary must be {_FORM}; got {source!r}, which begins without a heading")
        section.append(entry.split(","))
    if not any(found.values()):
        raise ValueError(f"a panoptic vocabulary must be {_FORM}; got {source!r}, which has no classes")
    return found["things"], found["stuff"]
