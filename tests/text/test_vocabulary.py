import logging

import pytest

from spar_d2.text import Vocabulary, load_templates


def test_inline_text():
    vocabulary = Vocabulary.load("cat, kitten; dog;sky ,")
    assert vocabulary.classes == (("cat", "kitten"), ("dog",), ("sky",))
    assert vocabulary.names == ["cat", "dog", "sky"]
    assert vocabulary.queries == ["cat", "kitten", "dog", "sky"]
    assert vocabulary.query_class == [0, 0, 1, 2]


def test_lines_separate_classes_too():
    assert Vocabulary.load("cat, kitten\ndog\n").names == ["cat", "dog"]


def test_words_with_a_slash_are_words():
    assert Vocabulary.load("tv/monitor, screen; n/a").names == ["tv/monitor", "n/a"]


def test_files_may_have_blank_lines_accents_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffété, summer\n\n  \n犬\nwood \n", encoding="utf-8")
    assert Vocabulary.load(str(path)).classes == (("été", "summer"), ("犬",), ("wood",))


def test_duplicates_are_merged_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary([["cat", "cat", "puss"], ["dog"], ["cat", "kitten"]])
    assert vocabulary.classes == (("cat", "puss", "kitten"), ("dog",))
    assert "'cat' more than once" in caplog.text


@pytest.mark.parametrize("text", ["", "  ", ";;", " , ; ,"])
def test_empty_text(text):
    with pytest.raises(ValueError, match="vocabulary is empty"):
        Vocabulary.load(text)


def test_empty_and_missing_and_binary_files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty.*empty\.txt"):
        Vocabulary.load(str(tmp_path / "empty.txt"))
    with pytest.raises(FileNotFoundError, match="no vocabulary file"):
        Vocabulary.load(str(tmp_path / "missing.txt"))
    with pytest.raises(FileNotFoundError, match="no vocabulary file"):
        Vocabulary.load("./classes")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match="not UTF-8"):
        Vocabulary.load(str(tmp_path / "binary.txt"))


def test_templates(tmp_path):
    assert len(load_templates("imagenet")) == 80
    assert load_templates("simple") == ("a photo of a {}.",)
    (tmp_path / "t.txt").write_text("a {}\n\nthe {} there\n")
    assert load_templates(str(tmp_path / "t.txt")) == ("a {}", "the {} there")
    (tmp_path / "bad.txt").write_text("no place\n")
    with pytest.raises(ValueError, match="must have one"):
        load_templates(str(tmp_path / "bad.txt"))
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.TEMPLATES"):
        load_templates("nothing")


def test_templates_that_are_no_text_are_named(tmp_path):
    (tmp_path / "photo.txt").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.TEMPLATES: .*photo\.txt is no text file in UTF-8"):
        load_templates(str(tmp_path / "photo.txt"))
