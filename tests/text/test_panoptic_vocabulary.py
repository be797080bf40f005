import json
import logging

import pytest

from spar_d2.text import PanopticVocabulary, Vocabulary


@pytest.mark.parametrize(
    "text",
    [
        "things: cat, kitten; dog; stuff: sky; grass, lawn",
        "things: cat, kitten\ndog\n\nstuff:\nsky\ngrass, lawn\n",
        "Stuff: sky; grass, lawn; THINGS : cat, kitten; ; dog ;",
        "things: cat, kitten; stuff: sky; things: dog; stuff: grass, lawn",
    ],
)
def test_headings_tell_things_from_stuff(text):
    vocabulary = PanopticVocabulary.of(text)
    assert vocabulary.things == 2 and len(vocabulary) == 4 and vocabulary.panoptic
    assert vocabulary.vocabulary.classes == (("cat", "kitten"), ("dog",), ("sky",), ("grass", "lawn"))


def test_only_things_or_only_stuff():
    assert PanopticVocabulary.of("things: cat; dog").things == 2
    stuff = PanopticVocabulary.of("stuff: sky")
    assert stuff.things == 0 and stuff.vocabulary.names == ["sky"]
    assert PanopticVocabulary.of({"stuff": ["sky"]}).things == 0


def test_dicts_and_vocabularies():
    classes = {"things": [["cat", "kitten"], "dog"], "stuff": ("sky",)}
    vocabulary = PanopticVocabulary.of(classes)
    assert vocabulary.things == 2 and vocabulary.vocabulary.classes == (("cat", "kitten"), ("dog",), ("sky",))
    assert PanopticVocabulary.of(vocabulary) is vocabulary


def test_other_colons_belong_to_the_words():
    vocabulary = PanopticVocabulary.of("things: game: chess; stuff: time 12:30; sky")
    assert vocabulary.vocabulary.names == ["game: chess", "time 12:30", "sky"]


@pytest.mark.parametrize("convert", [str, lambda path: path])
def test_files_with_accents_and_a_byte_order_mark(tmp_path, convert):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffthings:\nété, summer\n犬\n\nstuff:\nwood \n", encoding="utf-8")
    vocabulary = PanopticVocabulary.of(convert(path))
    assert vocabulary.things == 2
    assert vocabulary.vocabulary.classes == (("été", "summer"), ("犬",), ("wood",))


def test_missing_files_and_wrong_encodings_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary file .*none\.txt"):
        PanopticVocabulary.of(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("things: été".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        PanopticVocabulary.of(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize(
    "wrong",
    ["cat; dog", "cat; things: dog", "", " ", {"thing": ["cat"]}, {"things": ["cat"], "other": []}, ["cat"], 3, None],
)
def test_other_forms_are_an_error_that_shows_the_right_one(wrong):
    with pytest.raises(ValueError, match=r'panoptic vocabulary must be .*"things:" and "stuff:".*; got'):
        PanopticVocabulary.of(wrong)


@pytest.mark.parametrize("empty", ["things: ; stuff:", {}, {"things": [], "stuff": []}])
@pytest.mark.parametrize("panoptic", [True, False])
def test_empty_vocabularies_are_an_error(empty, panoptic):
    with pytest.raises(ValueError, match="vocabulary is empty"):
        PanopticVocabulary.of(empty, panoptic)


def test_a_word_of_things_and_stuff_belongs_to_the_things(caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary = PanopticVocabulary.of("stuff: sky, cloud; grass; things: cloud, cat")
    assert vocabulary.vocabulary.classes == (("cloud", "cat"), ("sky",), ("grass",))
    assert "cloud" in caplog.text


def test_in_semantic_segmentation_all_classes_are_stuff(tmp_path):
    (tmp_path / "classes.txt").write_text("cat, kitten\nsky\n")
    forms = ["cat, kitten; sky", [["cat", "kitten"], "sky"], Vocabulary.of("cat, kitten; sky")]
    for form in [*forms, str(tmp_path / "classes.txt")]:
        vocabulary = PanopticVocabulary.of(form, panoptic=False)
        assert vocabulary.things == 0 and not vocabulary.panoptic
        assert vocabulary.vocabulary.classes == (("cat", "kitten"), ("sky",))
    with pytest.raises(ValueError, match="no things in semantic"):
        PanopticVocabulary(["cat"], ["sky"], panoptic=False)


def test_names_of_classes_are_kept_in_semantic_segmentation():
    given = Vocabulary([["tree", "bush"], ["sky"]], names=["plants", "above"])
    assert PanopticVocabulary.of(given, panoptic=False).vocabulary.names == ["plants", "above"]
    assert PanopticVocabulary.of("voc21", panoptic=False).vocabulary.names[0] == "background"


def test_in_semantic_segmentation_things_become_stuff():
    text = "things: cat; dog; stuff: sky"
    for form in (text, {"things": ["cat", "dog"], "stuff": ["sky"]}, PanopticVocabulary.of(text)):
        vocabulary = PanopticVocabulary.of(form, panoptic=False)
        assert vocabulary.things == 0 and not vocabulary.panoptic
        assert vocabulary.vocabulary.names == ["cat", "dog", "sky"]


def test_stuff_alone_does_not_become_panoptic():
    for form in (Vocabulary.of("cat; sky"), PanopticVocabulary.of("cat; sky", panoptic=False)):
        with pytest.raises(ValueError, match='"things:"'):
            PanopticVocabulary.of(form)


def test_classes_by_examples_are_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    example = {"image": str(tmp_path / "a.jpg"), "boxes": [[0, 0, 8, 8]]}
    (tmp_path / "classes.yaml").write_text(json.dumps({"classes": [{"name": "cat", "examples": [example]}]}))
    with pytest.raises(ValueError, match="words, not examples"):
        PanopticVocabulary.of(str(tmp_path / "classes.yaml"), panoptic=False)
