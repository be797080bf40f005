import logging
import os
import re

import pytest

from spar_d2.text import Vocabulary, load_templates

# Classes of each built-in vocabulary, and whether class 0 is the background.
BUILT_IN = {
    "voc20": (20, False),
    "voc21": (21, True),
    "context59": (59, False),
    "context60": (60, True),
    "ade20k": (150, False),
    "cityscapes": (19, False),
    "coco_object": (81, True),
}
BACKGROUND = (
    "sky, wall, tree, wood, grass, road, sea, river, mountain, sand, desk, bed, building, cloud, lamp, door, window, "
    "wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence"
)


def test_inline_text():
    vocabulary = Vocabulary.load("cat, kitten; dog;sky ,")
    assert vocabulary.classes == (("cat", "kitten"), ("dog",), ("sky",))
    assert vocabulary.names == ["cat", "dog", "sky"]
    assert vocabulary.queries == ["cat", "kitten", "dog", "sky"]
    assert vocabulary.query_class == [0, 0, 1, 2]


def test_lines_separate_classes_too():
    assert Vocabulary.load("cat, kitten\ndog\n").names == ["cat", "dog"]


def test_class_names_may_contain_slashes():
    assert Vocabulary.load("tv/monitor, screen; n/a").names == ["tv/monitor", "n/a"]


def test_files_may_have_blank_lines_accents_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffété, summer\n\n  \n犬\nwood \n", encoding="utf-8")
    assert Vocabulary.load(str(path)).classes == (("été", "summer"), ("犬",), ("wood",))


@pytest.mark.parametrize(
    ("classes", "words", "names"),
    [
        (["tree", "sky", "tree"], [("tree",), ("sky",), ()], ["tree", "sky", "tree"]),
        (["tree", "", "  ", "sky"], [("tree",), (), (), ("sky",)], ["tree", "", "", "sky"]),
        (["", "cat"], [(), ("cat",)], ["", "cat"]),
        (["Hot dog", "hot  DOG", "e\u0301te", "\u00c9TE"], [("Hot dog",), (), ("\u00e9te",), ()], None),
        ([["cat", "cat", "puss"], "dog", ["cat", "kitten"]], [("cat", "puss"), ("dog",), ("kitten",)], None),
        ([["cat", "dog"], ["cat", "dog"], "dog"], [("cat",), (), ("dog",)], ["cat", "cat", "dog"]),
        ([["cat", "pet"], [" ", "pet"], ["cat", "pet", "dog"]], [("cat",), ("pet",), ("dog",)], ["cat", "pet", "dog"]),
    ],
)
def test_every_class_keeps_its_number(classes, words, names, caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary(classes)
    assert vocabulary.classes == tuple(words)
    assert len(vocabulary) == len(vocabulary.names) == len(classes)
    assert names is None or vocabulary.names == names
    assert vocabulary.query_class == [number for number, own in enumerate(words) for _ in own]
    silent = [number for number, own in enumerate(words) if not own]
    warned = [record.args[0] for record in caplog.records if "is never predicted" in record.getMessage()]
    assert warned == silent
    of_queries = [name for name, own in zip(vocabulary.names, words) if own]
    assert len(set(of_queries)) == len(of_queries)


def test_a_file_and_text_keep_classes_that_repeat(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\n\ndog\ncat, kitten\ndog\n")
    for vocabulary in (Vocabulary.from_file(tmp_path / "classes.txt"), Vocabulary.load("cat;;dog; ,;cat, kitten;dog")):
        assert vocabulary.classes == (("cat",), ("dog",), ("kitten",), ())
        assert vocabulary.names == ["cat", "dog", "kitten", "dog"]


@pytest.mark.parametrize("classes", [None, 3, [None], ["cat", 3], [["cat", None]], b"cat", [b"cat"]])
def test_values_that_are_no_text_are_an_error(classes):
    with pytest.raises(ValueError, match=r"must be a (string or a )?list of (strings|classes)"):
        Vocabulary.of(classes)


def test_a_synonym_that_another_class_has_is_dropped_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary([["cat", "dog", "pet"], ["dog", "pet", "puppy"], ["fish", "Cat"]])
    assert vocabulary.classes == (("cat", "pet"), ("dog", "puppy"), ("fish",))
    assert [record.getMessage() for record in caplog.records] == [
        "The synonym 'dog' of class 'cat' is dropped: it belongs to class 'dog'.",
        "The synonym 'pet' of class 'dog' is dropped: it belongs to class 'cat'.",
        "The synonym 'Cat' of class 'fish' is dropped: it belongs to class 'cat'.",
    ]


def test_names_are_compared_without_case_and_spacing_and_kept_as_written(caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary([["Hot  Dog", "hot dog", "HOT\tDOG"], ["e\u0301te\u0301"], ["\u00c9T\u00c9", "Sommer"]])
    assert vocabulary.classes == (("Hot  Dog",), ("\u00e9t\u00e9",), ("Sommer",))
    assert len(caplog.records) == 3


def test_classes_with_different_names_have_no_warnings(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(Vocabulary.load("cat, kitten;;dog\n\nsky")) == 3
    assert not caplog.records


def test_display_names_may_differ_from_the_queries():
    vocabulary = Vocabulary([["sky", "wall"], [" "], "cat"], names=["background", "nothing", "pet"])
    assert vocabulary.names == ["background", "nothing", "pet"]
    assert vocabulary.queries == ["sky", "wall", "cat"]
    assert vocabulary.query_class == [0, 0, 2]
    unnamed = Vocabulary(vocabulary.classes)
    assert vocabulary != unnamed
    assert vocabulary == Vocabulary(vocabulary.classes, names=vocabulary.names)
    assert len({vocabulary, unnamed, Vocabulary(vocabulary.classes)}) == 2


@pytest.mark.parametrize(
    ("names", "message"), [(["a"], "one name for each of the 2 classes, got 1"), (["a", "A"], "names must be unique")]
)
def test_wrong_names(names, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(["cat", "dog"], names=names)


def test_all_that_are_built_in_are_listed():
    assert Vocabulary.built_in() == sorted(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in(name, caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary.load(name)
    assert not caplog.records
    count, background = BUILT_IN[name]
    assert len(vocabulary) == len(vocabulary.names) == count
    assert len(set(vocabulary.query_class)) == count
    assert len(set(vocabulary.queries)) == len(vocabulary.queries)
    assert all(word == " ".join(word.split()) and word.isascii() for word in vocabulary.queries)
    start = int(background)
    assert vocabulary.names[start:] == [words[0] for words in vocabulary.classes[start:]]
    assert (vocabulary.names[0] == "background") == background
    assert [word for word in vocabulary.queries if word.startswith("person in ")] == [
        f"person in {what}" for what in ("shirt", "jeans", "dress", "sweater", "skirt", "jacket")
    ]


def test_names_of_the_background():
    voc, context, coco = (Vocabulary.load(name) for name in ("voc21", "context60", "coco_object"))
    words = voc.classes[0]
    assert ", ".join(words) == BACKGROUND
    assert coco.classes[0] == tuple(word for word in words if word != "bed")
    assert "bed" in coco.names
    assert context.classes[0] == ("background", *(word for word in words if word not in (*context.names, "shelf")))
    assert len(context.classes[0]) == 11
    assert voc.classes[1:] == Vocabulary.load("voc20").classes
    assert context.classes[1:] == Vocabulary.load("context59").classes


def test_a_name_that_is_misspelt_is_a_word():
    assert Vocabulary.load("VOC21").names == ["VOC21"]


def test_any_existing_file_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("words.lst", "voc21", "a, b"):
        (tmp_path / name).write_text("cat, kitten\r\ndog\r\n")
    assert Vocabulary.load("words.lst").classes == (("cat", "kitten"), ("dog",))
    assert len(Vocabulary.load("voc21")) == 21
    assert Vocabulary.load("a, b").classes == (("a", "b"),)
    (tmp_path / "wrong.lst").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"wrong\.lst is not UTF-8"):
        Vocabulary.load("wrong.lst")


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
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.TEMPLATES: .*photo\.txt .*UTF-8"):
        load_templates(str(tmp_path / "photo.txt"))


@pytest.mark.parametrize(
    ("source", "hint"), [("ade20", "did you mean the built-in 'ade20k'"), ("zebra", "every pixel")]
)
def test_a_single_word_is_warned_of(source, hint, caplog):
    assert Vocabulary.load(source).names == [source]
    assert hint in caplog.text


@pytest.mark.parametrize("classes", [{"cat", "dog"}, frozenset(["cat", "dog"]), {"cat": 1}.keys()])
def test_unordered_collections_are_an_error(classes):
    with pytest.raises(ValueError, match="vocabulary .*list"):
        Vocabulary(classes)


def test_only_line_ends_end_a_class(tmp_path):
    (tmp_path / "words.txt").write_bytes("a\u2028b\r\nc\x0cd\n\ne\x85f".encode())
    assert len(Vocabulary.from_file(tmp_path / "words.txt")) == 3


def test_a_pipe_is_no_vocabulary(tmp_path):
    os.mkfifo(tmp_path / "words.txt")
    with pytest.raises(FileNotFoundError, match=r"words\.txt"):
        Vocabulary.load(str(tmp_path / "words.txt"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat"] * 300, r"^299 classes .* are never predicted \(1 'cat', 2 'cat', 3 'cat', \.\.\.\)\.$"),
        ([["cow"] * 300], r"^299 synonyms of the vocabulary are duplicates"),
        (["emu", *(["ox", "emu"] for _ in range(1)), *([f"x{n}", "emu"] for n in range(9))], "^10 synonyms"),
    ],
)
def test_many_repeated_names_are_one_warning(classes, message, caplog):
    for _ in range(3):
        assert len(Vocabulary(classes)) == len(classes)
    (told,) = caplog.messages
    assert re.search(message, told)
    assert len(told) < 300


def test_half_a_character_is_named():
    with pytest.raises(ValueError, match=r"got half a character in 'cat\\ud83d'; remove it"):
        Vocabulary([["dog"], ["cat\ud83d"]])
