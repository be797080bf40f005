import functools
import gc
import logging
import multiprocessing
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reference import golden_names, load_golden
from spar_d2.encoders import TextTower, build_text_tower
from spar_d2.text import TextEmbeddings, Vocabulary, load_templates


class CountingTower:
    """Encodes texts by their bytes, and counts them."""

    def __init__(self):
        self.texts = []

    def encode(self, texts):
        self.texts += texts
        rows = [[float(len(text)), float(sum(text.encode()) % 97), 1.0] for text in texts]
        return torch.tensor(rows)

    def reads_all(self, text):
        return len(text) < 30


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_names("E_"))
def test_query_vectors_of_the_reference(name, reference_clip, tiny_model):
    arrays, meta = load_golden(name)
    vocabulary = Vocabulary(line.split(", ") for line in meta["class_file_text"].split("\n"))
    embeddings = TextEmbeddings(functools.partial(build_text_tower, *tiny_model), "tiny", load_templates("imagenet"))
    text, query_class = embeddings(vocabulary)
    torch.testing.assert_close(text, torch.from_numpy(arrays["query_features"]), rtol=0, atol=1e-5)
    assert query_class.tolist() == meta["query_idx"]


def test_vectors_are_unit_means_of_unit_vectors():
    tower = CountingTower()
    text, _ = TextEmbeddings(lambda: tower, "m", ["a {}", "the {}!"])(Vocabulary(["cat"]))
    one, two = (torch.nn.functional.normalize(v, dim=0) for v in CountingTower().encode(tower.texts))
    torch.testing.assert_close(text[0], torch.nn.functional.normalize((one + two) / 2, dim=0))


def test_class_names_may_contain_braces():
    tower = CountingTower()
    TextEmbeddings(lambda: tower, "m", ["a {}."])(Vocabulary(["{x} {}"]))
    assert tower.texts == ["a {x} {}."]


def test_computed_once_per_content_on_disk_too(tmp_path):
    towers = []

    def build():
        towers.append(CountingTower())
        return towers[-1]

    def embed(words, identity="m", templates=("a {}",)):
        return TextEmbeddings(build, identity, templates, tmp_path)(Vocabulary(words))[0]

    first = embed(["cat", "dog"])
    assert torch.equal(embed(["cat", "dog"]), first)
    assert len(towers) == 1
    embed(["cat", "dogs"])
    embed(["cat", "dog"], identity="other weights")
    embed(["cat", "dog"], templates=("the {}",))
    assert len(towers) == 4
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(embed(["cat", "dog"]), first)
    assert len(towers) == 5


def test_only_new_class_names_are_encoded():
    tower = CountingTower()
    embeddings = TextEmbeddings(lambda: tower, "m", ["a {}"])
    embeddings(Vocabulary(["cat", "dog"]))
    text, query_class = embeddings(Vocabulary([["dog", "bird"], "cat"]))
    assert tower.texts == ["a cat", "a dog", "a bird"]
    assert query_class.tolist() == [0, 0, 1]
    assert torch.equal(text, TextEmbeddings(CountingTower, "m", ["a {}"])(Vocabulary(["dog", "bird", "cat"]))[0])


def test_only_the_last_names_are_kept(monkeypatch):
    monkeypatch.setattr("spar_d2.text.embeddings._QUERIES_KEPT", 3)
    tower = CountingTower()
    embeddings = TextEmbeddings(lambda: tower, "x", ["{}"])
    first, _ = embeddings(Vocabulary.load("a; b"))
    embeddings(Vocabulary.load("c; d; e; f"))
    assert torch.equal(embeddings(Vocabulary.load("d; e; f"))[0], embeddings(Vocabulary.load("d; e; f"))[0])
    assert tower.texts == ["a", "b", "c", "d", "e", "f"]
    again, _ = embeddings(Vocabulary.load("a; b"))
    assert torch.equal(again, first) and tower.texts[6:] == ["a", "b"]


def test_entries_for_another_number_of_names_are_not_used(tmp_path):
    embeddings = TextEmbeddings(CountingTower, "m", ["a {}"], tmp_path)
    embeddings(Vocabulary(["cat", "dog"]))
    (file,) = tmp_path.iterdir()
    save_file({"text": torch.zeros(1, 3)}, file)
    text, _ = TextEmbeddings(CountingTower, "m", ["a {}"], tmp_path)(Vocabulary(["cat", "dog"]))
    assert text.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_truncated_class_names_are_reported(caplog):
    long = "w" * 40
    TextEmbeddings(CountingTower, "m", ["a {} in a very long sentence that ends somewhere"])(Vocabulary(["cat", long]))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"Class name exceeds the context length of the text encoder: {long!r}"
    ]


@pytest.mark.parametrize(
    ("text", "read"),
    [("a cat", True), ("cat " * 75, True), ("cat " * 75 + "é", False), ("cat " * 80, False), ("木" * 60, False)],
)
def test_truncated_text_is_found(tiny_model, text, read):
    assert build_text_tower(*tiny_model).reads_all(text.strip()) is read


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SPAR_CACHE", str(tmp_path))
    TextEmbeddings(CountingTower, "m", ["a {}"], "auto")(Vocabulary(["cat"]))
    assert [file.suffix for file in (tmp_path / "text").iterdir()] == [".safetensors"]


@pytest.mark.slow
def test_the_tower_is_freed_after_use(tiny_model):
    alive = []

    def build() -> TextTower:
        tower = build_text_tower(*tiny_model)
        alive.append(weakref.ref(tower))
        return tower

    TextEmbeddings(build, "m", ["a {}"])(Vocabulary(["cat"]))
    gc.collect()
    assert alive[0]() is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    text, _ = TextEmbeddings(CountingTower, "m", ["a {}"], tmp_path / "file" / "folder")(Vocabulary(["cat"]))
    assert text.shape == (1, 3)
    assert caplog.text.count("MODEL.SPAR.TEXT_CACHE") == 1


def use_cache_as_somebody_without_rights(folder: str) -> None:
    """In a separate process, which drops its permissions."""
    os.setgid(65534)
    os.setuid(65534)
    os.environ["HOME"] = f"{folder}/home"
    os.environ.pop("SPAR_CACHE", None)
    messages = []
    logging.getLogger("spar_d2").addHandler(handler := logging.Handler())
    handler.emit = lambda record: messages.append(record.getMessage())
    text, _ = TextEmbeddings(CountingTower, "m", ["a {}"], "auto")(Vocabulary(["cat", "dog"]))
    assert text.shape == (2, 3)
    assert len(messages) == 1 and "Permission denied" in messages[0] and "TEXT_CACHE" in messages[0], messages


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give up its rights")
def test_a_home_that_may_not_be_entered_is_no_error(tmp_path):
    (tmp_path / "home").mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    process = multiprocessing.get_context("fork").Process(
        target=use_cache_as_somebody_without_rights, args=(str(tmp_path),)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_user_without_a_home_is_no_error(monkeypatch, caplog):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPAR_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    text, _ = TextEmbeddings(CountingTower, "m", ["a {}"], "auto")(Vocabulary(["cat"]))
    assert text.shape == (1, 3)
    assert caplog.text.count("Text embeddings are not cached on disk") == 1
