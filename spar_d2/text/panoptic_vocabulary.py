"""Vocabularies that tell things, whose objects are told apart, from stuff."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from spar_d2.text.examples import ExampleVocabulary
from spar_d2.text.vocabulary import Vocabulary

_HEADINGS = ("things", "stuff")
_HEADED = re.compile(rf"[\s;]*({'|'.join(_HEADINGS)})\s*:", re.IGNORECASE)
_FORM = (
    'a text or file with the headings "things:" and "stuff:" before their classes, such as "things: cat, kitten; dog; '
    'stuff: sky; grass"'
)

Classes = Sequence[str | Sequence[str]]


class PanopticVocabulary:
    """Classes of things and of stuff, things first.

    Args:
        things, stuff: classes, as for :class:`Vocabulary`. Without things, stuff may also be a vocabulary.
        panoptic: whether things and stuff are told apart. Otherwise, all classes are stuff.

    Attributes:
        vocabulary: all classes.
        things: number of thing classes.

    Raises:
        ValueError: as :class:`Vocabulary`, or there are things although they are not told apart.
    """

    def __init__(self, things: Classes, stuff: Classes | Vocabulary, panoptic: bool = True) -> None:
        self.things, self.panoptic = len(things), panoptic
        if self.things and not panoptic:
            raise ValueError(f"the vocabulary must have no things in semantic segmentation, got {self.things}")
        self.vocabulary = stuff if isinstance(stuff, Vocabulary) else Vocabulary([*things, *stuff])

    def __len__(self) -> int:
        return len(self.vocabulary)

    @classmethod
    def of(cls, classes: object, panoptic: bool = True) -> PanopticVocabulary:
        """Convert to a vocabulary.

        Args:
            classes: a :class:`PanopticVocabulary`; a dict with "things" and "stuff", each a list of classes; or, as
                inline text or a UTF-8 file, the heading "things:" or "stuff:" before its classes. Classes are separated
                by ";" or newlines, and synonyms by ",". In semantic segmentation, any form of :meth:`Vocabulary.of` is
                accepted, too.
            panoptic: whether things and stuff are told apart; otherwise, all classes become stuff.

        Raises:
            ValueError: the form is another one, or the vocabulary is empty.
            FileNotFoundError: a file does not exist.
        """
        if isinstance(classes, PanopticVocabulary):
            if classes.panoptic == panoptic:
                return classes
            classes = classes.vocabulary
        kinds = _things_and_stuff(classes)
        if kinds is not None and not any(kinds):
            raise ValueError(f"the vocabulary is empty: it must be {_FORM}; got {classes!r}")
        if kinds is not None:
            return cls(*kinds) if panoptic else cls((), [*kinds[0], *kinds[1]], panoptic=False)
        if panoptic:
            raise ValueError(f"a panoptic vocabulary must be {_FORM}; or a dict with things and stuff; got {classes!r}")
        vocabulary = Vocabulary.of(classes)  # pyright: ignore[reportArgumentType]
        if isinstance(vocabulary, ExampleVocabulary):
            raise ValueError("the classes of a mask transformer must be words, not examples")
        return cls((), vocabulary, panoptic=False)


def _things_and_stuff(classes: object) -> tuple[Classes, Classes] | None:
    """Return the classes under both headings; None if there are no headings."""
    if isinstance(classes, Mapping) and set(classes) <= set(_HEADINGS):
        return list(classes.get("things") or ()), list(classes.get("stuff") or ())
    if isinstance(classes, (str, os.PathLike)):
        text = _text(os.fspath(classes))
        return _parsed(text) if _HEADED.match(text) else None
    return None


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


def _parsed(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the synonyms of all classes of things and of stuff, from a text that begins with a heading."""
    found: dict[str, list[list[str]]] = {heading: [] for heading in _HEADINGS}
    section: list[list[str]] = []
    for entry in re.split("[;\n]", text):
        if match := _HEADED.match(entry):
            section, entry = found[match[1].casefold()], entry[match.end() :]
        if entry.strip():
            section.append(entry.split(","))
    return found["things"], found["stuff"]
