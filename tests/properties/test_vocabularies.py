"""Vocabularies keep the numbers of their classes, there and back."""

import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_d2.text import Vocabulary

# Without the separators of synonyms and classes.
WORDS = st.text(st.characters(exclude_characters=",;\n\r", exclude_categories=["Cs", "Cc"]), max_size=6)
CLASSES = st.lists(st.lists(WORDS | st.sampled_from(["cat", "Cat ", "dog"]), max_size=3), min_size=1, max_size=8)


def cleaned(word: str) -> str:
    return unicodedata.normalize("NFC", word).strip()


def has_words(classes: list[list[str]]) -> bool:
    return any(cleaned(word) for words in classes for word in words)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(classes=CLASSES.filter(has_words))
def test_every_class_keeps_its_number_and_its_names(classes):
    vocabulary = Vocabulary(classes)
    assert len(vocabulary) == len(vocabulary.names) == len(classes)
    for number, (words, kept) in enumerate(zip(classes, vocabulary.classes)):
        assert set(kept) <= {cleaned(word) for word in words}, number
    folded = [" ".join(query.casefold().split()) for query in vocabulary.queries]
    assert len(set(folded)) == len(folded)
    # Every word is found, in this class or in another one that has it.
    given_words = {" ".join(cleaned(word).casefold().split()) for words in classes for word in words} - {""}
    normal = {unicodedata.normalize("NFC", word) for word in folded}
    assert {unicodedata.normalize("NFC", word) for word in given_words} == normal


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(classes=CLASSES.filter(has_words))
def test_a_file_gives_the_vocabulary_back(classes):
    vocabulary = Vocabulary([words for words in classes if any(map(cleaned, words))])
    written = [words for words in vocabulary.classes if words]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.txt"
        path.write_text("\n".join(", ".join(words) for words in written), encoding="utf-8")
        again = Vocabulary.from_file(path)
    assert again.classes == tuple(written)
    assert again.queries == [word for words in written for word in words]
