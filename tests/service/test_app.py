"""Responses of the service are those of the Python functions."""

import io
import re

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from reference import ROOT
from services import ENCODER, PRETRAINED, WORDS, encoded, running, scene, toy_model, unpack
from spar_d2 import __version__
from spar_d2.predict import Predictor
from spar_d2.text import Vocabulary
from spar_d2.visualization import class_colors, fit_pca_colors


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(ENCODER, PRETRAINED, templates="simple", device="cpu")


@pytest.fixture(scope="module")
def client():
    with (
        running(vocabulary=Vocabulary.load("tree; star; sand")) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def post(client: httpx.Client, pixels: np.ndarray, path: str = "/segment", **fields) -> httpx.Response:
    response = client.post(path, files={"image": ("a.png", encoded(pixels))}, data=fields)
    assert response.status_code == 200, response.text
    return response


def test_the_record_has_labels_classes_and_scores(client, predictor):
    pixels = scene(1, 70, 101)
    expected = predictor(pixels, WORDS, scores=True)
    record = post(client, pixels, words=WORDS, scores="true").json()
    labels = unpack(record["labels"])
    assert labels.dtype == np.uint8 and np.array_equal(labels, expected.labels)
    assert (record["width"], record["height"]) == (101, 70)
    assert {one["name"]: one["area"] for one in record["classes"]} == expected.areas
    areas = [one["pixels"] for one in record["classes"]]
    assert areas == sorted(areas, reverse=True) and sum(areas) == 70 * 101
    for one in record["classes"]:
        assert one["color"] == list(class_colors(7)[one["number"]])
        assert one["pixels"] == (labels == one["number"]).sum()
    assert record["vocabulary"][0] == ["circle", "disk"]
    assert record["seconds"] > 0 and record["images"] == 1
    low, high = record["scores"]["low"], record["scores"]["high"]
    scores = low + unpack(record["scores"]) * (high - low) / 255
    for y, x in ((0, 0), (69, 100), (16, 15), (15, 16), (33, 80)):
        score = expected.scores[labels[y, x], y // expected.patch_size, x // expected.patch_size]
        assert scores[y, x] == pytest.approx(score, abs=(high - low) / 500)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"logit_scale": "10", "prob_threshold": "0.2"}, {"logit_scale": 10.0, "prob_threshold": 0.2}),
        ({"area_threshold": "0.1"}, {"area_threshold": 0.1}),
        ({"refine": "lposs, lposs+"}, {"refine": "lposs,lposs+"}),
        ({"inference": "sliding_window", "stride": "32"}, {"inference": "sliding_window", "stride": 32}),
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_label_maps_follow_the_options(client, predictor, fields, options):
    pixels = scene(2)
    with Image.open(io.BytesIO(post(client, pixels, words=WORDS, format="png", **fields).content)) as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), predictor(pixels, WORDS, **options).labels)


def test_many_classes_need_16_bits(client, predictor):
    words, pixels = "; ".join(f"thing {number}" for number in range(256)), scene(3, 32, 48)
    with running(max_classes=300) as address, httpx.Client(base_url=address, timeout=60) as other:
        answers = [post(other, pixels, words=f"star; {words}", format=kind) for kind in ("png", "json")]
    with Image.open(io.BytesIO(answers[0].content)) as image:
        assert image.mode == "I;16"
        labels = np.asarray(image)
    assert labels.max() > 0 and np.array_equal(labels, predictor(pixels, f"star; {words}").labels)
    packed = answers[1].json()["labels"]
    assert packed["dtype"] == "uint16" and np.array_equal(unpack(packed), labels)


def test_the_overlay_is_that_of_python(client, predictor):
    pixels = scene(4)
    with Image.open(io.BytesIO(post(client, pixels, words=WORDS, format="overlay").content)) as image:
        assert np.array_equal(np.asarray(image), predictor(pixels, WORDS).draw())


def test_features_are_colored_patch_by_patch(client, predictor):
    pixels, patch = scene(5, 70, 101), toy_model().patch_size
    features = predictor.features(pixels)
    colors = (fit_pca_colors([features])(features) * 255).round().to(torch.uint8).numpy()
    with Image.open(io.BytesIO(post(client, pixels, "/features").content)) as image:
        picture = np.asarray(image)
    assert picture.shape == pixels.shape
    for y, x in ((0, 0), (69, 100), (16, 15), (40, 50)):
        assert np.array_equal(picture[y, x], colors[y // patch, x // patch])


def test_words_may_be_a_built_in_vocabulary_or_the_default(client, predictor):
    pixels = scene(6)
    record = post(client, pixels, words=" voc21 ").json()
    assert record["vocabulary"] == [list(names) for names in Vocabulary.load("voc21").classes]
    record = post(client, pixels).json()
    assert record["vocabulary"] == [["tree"], ["star"], ["sand"]]
    assert np.array_equal(unpack(record["labels"]), predictor(pixels, "tree; star; sand").labels)


def test_photos_are_turned_upright(client):
    image, file = Image.fromarray(scene(7, 40, 80)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    response = client.post("/segment", files={"image": file.getvalue()}, data={"words": "a; b"})
    assert (response.json()["width"], response.json()["height"]) == (40, 80)


def test_health_and_settings(client):
    health = client.get("/health").json()
    assert health == {"status": "ok", "version": __version__, "encoder": "tiny_clip", "device": "cpu", "waiting": 0}
    settings = client.get("/settings").json()
    assert settings["words"] == ["tree", "star", "sand"] and settings["vocabularies"]["voc21"] == 21
    assert settings["limits"]["max_pixels"] == 2**22


def test_the_example_of_the_documentation_runs(client, predictor, tmp_path, monkeypatch):
    pixels = scene(8)
    (tmp_path / "photo.jpg").write_bytes(encoded(pixels))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "deploying.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "httpx" in code)
    found = {}
    exec(code.replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/")), found)
    assert np.array_equal(found["labels"], predictor(pixels, "cat; dog; sky").labels)


def test_the_description_names_every_field(client):
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/segment"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "words", "refine", "inference"} <= schema["properties"].keys() and schema["required"] == ["image"]
