"""A warm model for many images, vocabularies and threads."""

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import spar_d2
from reference import ROOT, reference_image
from spar_d2 import predict
from spar_d2.data.image_arguments import read_image
from spar_d2.encoders import build_encoder
from spar_d2.modeling import image_segmentor
from spar_d2.teacher import SlidingWindowTeacher

MODEL = (str(ROOT / "configs/toy/tiny_clip.json"), str(ROOT / "configs/toy/tiny_clip.safetensors"))
WORDS = "grass, meadow; circle; star; water"


@pytest.fixture(scope="module")
def predictor():
    return spar_d2.Predictor(*MODEL, templates="simple", device="cpu")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_it_equals_the_function(predictor):
    image = reference_image(70, 101)
    result = predictor(image, WORDS)
    expected = spar_d2.segment(image, WORDS, *MODEL, templates="simple")
    assert np.array_equal(result.labels, expected.labels) and result.areas == expected.areas
    assert result.scores is None and expected.image is not None


def test_images_of_every_kind(predictor, tmp_path):
    pixels = reference_image(60, 90)
    (tmp_path / "a.png").write_bytes(png(pixels))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    with open(tmp_path / "a.png", "rb") as file:
        kinds = (
            *(tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, png(pixels), file),
            *(bytearray(png(pixels)), io.BytesIO(png(pixels)), tensor, tensor.float() / 255, tensor.double() / 255),
        )
        results = predictor(kinds, WORDS)
    assert len(results) == len(kinds)
    expected = predictor(pixels, WORDS).labels
    for result in results:
        assert np.array_equal(result.image, pixels)
        assert (result.labels == expected).mean() > 0.999, "rounding differs in a batch"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 8, 8), r"3, H, W.* got Tensor float32 \(1, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "got Tensor int64"),
        (torch.full((3, 8, 8), 255.0), r"0\.\.1 .* got Tensor with 255\.\.255"),
        (torch.full((3, 8, 8), torch.nan), "got Tensor with nan"),
        (torch.zeros(3, 0, 8), "RGB, got float32 .0"),
        (io.StringIO("text"), "binary file object"),
        (b"", "encoded image.* got bytes"),
        (np.zeros((8, 8, 3)), "uint8 RGB, got float64"),
        ({}, "got dict"),
    ],
)
def test_other_images_are_refused(predictor, image, message):
    with pytest.raises(ValueError, match=f"image must be .*{message}"):
        predictor([reference_image(8, 8), image], WORDS)


def test_a_file_object_at_its_end_is_named():
    file = io.BytesIO(png(reference_image(8, 8)))
    file.read()
    with pytest.raises(ValueError, match=r"got BytesIO without bytes, or it was read to its end: call seek\(0\) first"):
        read_image(file)


def test_large_encoded_images_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="SPAR_MAX_PIXELS"):
        read_image(png(reference_image(40, 40)))


def test_images_of_one_size_are_encoded_together(predictor, monkeypatch):
    sizes = [(48, 64), (64, 48), (48, 64), (32, 32), *[(48, 64)] * 8]
    images = [reference_image(*size, index) for index, size in enumerate(sizes)]
    batches = []
    handle = predictor._segmentor.encoder.register_forward_pre_hook(lambda _, x: batches.append(tuple(x[0].shape)))
    try:
        results = predictor(images, WORDS)
        assert [shape[0] for shape in batches] == [8, 2, 1, 1]
        monkeypatch.setattr(predict, "_PIXELS_AT_ONCE", 3 * 48 * 64)
        batches.clear()
        predictor(images, WORDS)
        assert [shape[0] for shape in batches] == [3, 3, 3, 1, 1, 1]
        monkeypatch.setattr(predict, "_PIXELS_AT_ONCE", 1)
        predictor(images[:1], WORDS)
    finally:
        handle.remove()
    for image, result in zip(images, results):
        single = predictor(image, WORDS).labels
        assert result.labels.shape == single.shape and (result.labels == single).mean() > 0.999
    assert predictor([], WORDS) == []


def test_threads_with_different_words_get_their_own_results(predictor):
    images = [reference_image(48, 64, index) for index in range(3)]
    # More vocabularies than are kept.
    words = [f"grass; circle; class {number}" for number in range(image_segmentor._VOCABULARIES_KEPT + 3)]
    expected = {word: [predictor(image, word).labels for image in images] for word in words}
    assert len({labels[0].tobytes() for labels in expected.values()}) > 1
    found, failures = [], []

    def work(offset: int) -> None:
        try:
            for number in range(8):
                word, index = words[(offset * 5 + number) % len(words)], number % len(images)
                found.append(np.array_equal(predictor(images[index], word).labels, expected[word][index]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(found) == 48 and all(found)
    assert len(predictor._segmentor._classes) <= image_segmentor._VOCABULARIES_KEPT


def test_scores_are_cosines_of_the_best_synonym(predictor):
    image = reference_image(70, 101)
    result = predictor(image, ["grass", ["circle", "disc"], "", "star"], scores=True)
    features = torch.nn.functional.normalize(predictor.features(image), dim=0)
    single = [predictor(image, [word], scores=True).scores[0] for word in ("grass", "circle", "disc", "star")]
    expected = np.stack([single[0], np.maximum(single[1], single[2]), np.full_like(single[0], -1), single[3]])
    assert result.scores.dtype == np.float32 and result.patch_size == 8
    assert result.scores.shape == (4, *features.shape[1:]) == (4, 9, 13)
    assert np.abs(result.scores - expected).max() < 1e-5
    assert result.scores.min() >= -1 and result.scores.max() <= 1
    # The labels of a patch's middle follow from the scores of patches.
    best = result.scores.argmax(0)
    assert (result.labels[4:70:8, 4:101:8] == best[: len(range(4, 70, 8)), : len(range(4, 101, 8))]).mean() > 0.9


def test_features_are_those_of_the_encoder(predictor):
    image = reference_image(70, 101)
    encoder = build_encoder(*MODEL).freeze()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.pixel_mean, encoder.pixel_std))
    x = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        expected = encoder(x[None])[0]
    features = predictor.features(image)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert torch.allclose(features, expected, atol=1e-4)


def test_the_sliding_window_is_that_of_the_teacher(predictor):
    from spar_d2.encoders.registry import build_text_tower
    from spar_d2.modeling import segment_features
    from spar_d2.text import TextEmbeddings, Vocabulary, load_templates

    image = reference_image(90, 130)
    encoder = build_encoder(*MODEL)
    embeddings = TextEmbeddings(lambda: build_text_tower(*MODEL), "", load_templates("simple"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.pixel_mean, encoder.pixel_std))
    x = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    features = SlidingWindowTeacher(encoder, None, 16)(x[None])[0]
    covered = (features.shape[1] * 8, features.shape[2] * 8)
    expected = segment_features(features, *embeddings(Vocabulary.load(WORDS)), (90, 130), covered).numpy()
    labels = predictor(image, WORDS, inference="sliding_window", stride=16).labels
    assert (labels == expected).mean() > 0.999
    assert (labels != predictor(image, WORDS).labels).mean() > 0.02, "another result than a single pass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference": "teacher"}, "inference must be one of single_pass, sliding_window; got 'teacher'"),
        ({"inference": "sliding_window", "window": 12}, "multiple of the patch size 8; got 12"),
        ({"inference": "sliding_window", "stride": 0}, "stride .* got 0"),
        ({"inference": "sliding_window", "stride": 2.5}, "stride must be a whole number, got 2.5"),
        ({"refine": "anyup"}, "anyup .* must be the weights"),
        ({"prob_threshold": True}, "prob_threshold must be a number"),
    ],
)
def test_wrong_options_are_named(predictor, options, message):
    with pytest.raises(ValueError, match=message):
        predictor(reference_image(32, 32), WORDS, **options)


def test_the_function_keeps_a_few_models(tiny_model):
    predict._kept.cache_clear()
    image = reference_image(32, 32)
    for templates in ("simple", "imagenet", "simple"):
        spar_d2.segment(image, "a; b", *tiny_model, templates=templates)
    info = predict._kept.cache_info()
    assert (info.hits, info.misses, info.maxsize) == (1, 2, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_default_device_is_the_cpu_where_there_is_no_gpu(predictor):
    assert predict.ModelSettings.of(*MODEL, "simple", None, "", "", "auto", None, None, None, "", "").device == "cpu"
