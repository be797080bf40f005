"""Limits of words, patches and the disk."""

import os
from pathlib import Path

import httpx
import pytest

from services import ENCODER, PRETRAINED, WORDS, encoded, running, scene
from spar_d2.predict import Predictor
from spar_d2.service.model import Model
from spar_d2.text import Vocabulary


def post(address: str, words: str, path: str = "/segment", height: int = 32) -> httpx.Response:
    fields = {"words": words} if path == "/segment" else {}
    return httpx.post(address + path, files={"image": encoded(scene(0, height, 48))}, data=fields, timeout=60)


def test_words_of_only_separators_are_not_those_of_the_start():
    with running(vocabulary=Vocabulary.load("star; sand")) as address:
        assert post(address, " ").status_code == 200
        response = post(address, " ; , ")
    assert response.status_code == 422 and "words must name at least one class" in response.json()["error"]


@pytest.mark.parametrize("path", ["/segment", "/features"])
def test_too_many_patches(path):
    with running(max_patches=24) as address:
        assert post(address, WORDS, path).status_code == 200
        response = post(address, WORDS, path, 33)
    assert response.status_code == 413
    assert "30 patches of 8 x 8 pixels; at most 24 are allowed" in response.json()["error"]


def test_the_words_of_clients_do_not_fill_the_disk():
    folder = Path(os.environ["SPAR_CACHE"])
    predictor = Predictor(ENCODER, PRETRAINED, templates="simple", device="cpu")
    own = Vocabulary.load("pebble; heather")
    with running(Model(predictor, ENCODER, PRETRAINED, vocabulary=own), vocabulary=own) as address:

        def written(words: str) -> int:
            before = len(list(folder.rglob("*.safetensors")))
            assert post(address, words).status_code == 200
            return len(list(folder.rglob("*.safetensors"))) - before

        assert [written(words) for words in ("", "quagmire; fen", "moor", "", "fen")] == [1, 0, 0, 0, 0]
