import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import spar_d2
from reference import ROOT, STAND_IN, reference_image
from spar_d2.encoders.weights import write_safetensors
from spar_d2.text import Vocabulary


def test_file_image_and_array_give_the_same(tiny_model, tmp_path):
    pixels = reference_image(70, 101)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = "cat, kitten; dog; été"
    results = [
        spar_d2.segment(image, vocabulary, *tiny_model, templates="simple")
        for image, vocabulary in (
            (str(tmp_path / "a.png"), words),
            (Image.fromarray(pixels), Vocabulary.load(words)),
            (pixels, words),
        )
    ]
    for result in results:
        assert result.labels.shape == (70, 101)
        assert result.names == ["cat", "dog", "été"]
        assert np.array_equal(result.labels, results[0].labels)
        assert sum(result.areas.values()) == pytest.approx(1)
        assert set(result.areas) == {result.names[k] for k in np.unique(result.labels)}


def test_turned_photos_are_read_upright(tiny_model, tmp_path):
    image = Image.fromarray(reference_image(40, 80))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert spar_d2.segment(tmp_path / "turned.jpg", "a;b", *tiny_model, templates="simple").labels.shape == (80, 40)


def test_wrong_images_are_named(tiny_model, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg cannot be read"):
        spar_d2.segment(tmp_path / "text.jpg", "a", *tiny_model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        spar_d2.segment(tmp_path / "none.jpg", "a", *tiny_model)
    with pytest.raises(ValueError, match="uint8 RGB"):
        spar_d2.segment(np.zeros((4, 4)), "a", *tiny_model)


def test_changed_weights_are_loaded_again(tiny_model):
    image = reference_image(64, 64)
    before = spar_d2.segment(image, "cat; dog; sky", *tiny_model, templates="simple").labels
    weights = load_file(tiny_model[1])
    weights["visual.proj"] = -weights["visual.proj"]
    write_safetensors(weights, tiny_model[1])
    assert not np.array_equal(spar_d2.segment(image, "cat; dog; sky", *tiny_model, templates="simple").labels, before)


@pytest.mark.slow
def test_changed_shards_are_loaded_again(tiny_model, tmp_path):
    """Also where the time of a file is that of the one before."""
    image, shard = reference_image(32, 48), tmp_path / "model-00001-of-00001.safetensors"
    weights = load_file(tiny_model[1])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, shard.name)}))

    def labels() -> np.ndarray:
        return spar_d2.segment(image, "cat; dog; sky", tiny_model[0], index, templates="simple").labels

    write_safetensors(weights, shard)
    before, times = labels(), shard.stat()
    write_safetensors({**weights, "visual.proj": weights["visual.proj"].flip(1)}, shard)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not np.array_equal(labels(), before)


def test_changed_templates_are_read_again(tiny_model, tmp_path):
    image, templates = reference_image(32, 48), tmp_path / "templates.txt"
    found = []
    for text in ("a photo of a {}.", "{}, as an origami on the wall of a castle in the rain"):
        templates.write_text(text, encoding="utf-8")
        found.append(spar_d2.segment(image, "cat; dog; sky", *tiny_model, templates=templates).labels)
    assert not np.array_equal(*found)


def test_flipped_views_lists_of_names_and_paths_are_taken(tiny_model):
    from pathlib import Path

    pixels = reference_image(48, 64)
    models = [Path(name) for name in tiny_model]
    flipped = spar_d2.segment(pixels[:, :, ::-1], ["cat", "dog"], *models, templates="simple")
    assert np.array_equal(
        flipped.labels, spar_d2.segment(pixels[:, :, ::-1].copy(), "cat;dog", *tiny_model, templates="simple").labels
    )


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        (ROOT / "configs/toy/tiny_pooled.json", {}),
        ("dinov3_vitl16_dinotxt_tet1280d20h24l", {"dinov3_repo": STAND_IN}),
    ],
    ids=["SigLIP", "DINOv3.txt"],
)
def test_other_families_with_text(encoder, options):
    result = spar_d2.segment(reference_image(70, 101), "cat; dog", encoder, "", templates="simple", **options)
    assert result.labels.shape == (70, 101)


def test_a_family_without_text_names_those_with_it():
    with pytest.raises(ValueError, match=r"'vit_nano_patch8_dinov3' \(DINOv3\) has no text tower.*ViT-B-16-SigLIP"):
        spar_d2.segment(reference_image(16, 16), "cat", "vit_nano_patch8_dinov3", "")


def test_thresholds_and_scale_are_those_of_segment_features(tiny_model):
    image = reference_image(64, 80)

    def labels(**options):
        return spar_d2.segment(image, "sky; cat; dog; tree", *tiny_model, templates="simple", **options).labels

    plain = labels()
    assert len(np.unique(plain)) > 2
    assert np.array_equal(labels(logit_scale=1.0), plain), "the scale alone changes nothing"
    assert not labels(logit_scale=1.0, prob_threshold=0.9).any(), "all probabilities are near a quarter"
    assert labels(logit_scale=1e4, prob_threshold=0.9).any()
    areas = np.bincount(plain.ravel(), minlength=4)[1:] / (plain > 0).sum()
    kept = labels(area_threshold=float(np.sort(areas)[-2]))
    assert set(np.unique(kept)) <= {0, int(areas.argmax()) + 1}


def test_it_is_drawn_over_its_photo(tiny_model):
    from spar_d2.visualization import class_colors
    from spar_d2.visualization.overlay import draw_overlay

    image = reference_image(64, 80)
    result = spar_d2.segment(image, "cat; dog", *tiny_model, templates="simple")
    picture = result.draw(Image.fromarray(image))
    assert np.array_equal(picture, draw_overlay(image, result.labels, ["cat", "dog"], class_colors(2)))
    with pytest.raises(ValueError, match="labels must be"):
        result.draw(image[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_labels_do_not_depend_on_autocast(tiny_model, precision):
    arguments = (reference_image(64, 80), "sky; cat; dog; tree", *tiny_model, "simple")
    expected = spar_d2.segment(*arguments, precision=precision).labels
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert np.array_equal(spar_d2.segment(*arguments, precision=precision).labels, expected)


def test_a_wrong_precision_is_named_with_those_there_are(tiny_model):
    with pytest.raises(ValueError, match=r"precision .*float32, .*, auto; got 'bf16'"):
        spar_d2.segment(reference_image(16, 16), "cat", *tiny_model, precision="bf16")


def test_classes_with_the_same_name_keep_their_numbers_and_are_distinguished(tiny_model):
    pixels = reference_image(48, 64)
    result = spar_d2.segment(pixels, ["tree", "tree", "", ["TREE", "wood"], "sky"], *tiny_model, templates="simple")
    plain = spar_d2.segment(pixels, ["tree", "wood", "sky"], *tiny_model, templates="simple")
    assert result.names == ["tree", "tree", "", "wood", "sky"]
    assert np.array_equal(result.labels, np.array([0, 3, 4])[plain.labels])
    assert result.areas == plain.areas
    assert result.draw(pixels).ndim == 3
    # The name of class 0 may be empty: its pixels are those of no other.
    rest = spar_d2.segment(pixels, ["", "tree", "sky"], *tiny_model, templates="simple", area_threshold=1.0)
    assert rest.areas == {"": 1.0}
    assert rest.draw(pixels).ndim == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": None}, "image must be a file, a PIL image or an array .* got NoneType"),
        ({"image": 3}, "image must be"),
        ({"image": [[0]]}, "image must be .* got list"),
        ({"image": torch.zeros(8, 8, 3)}, "image must be .* got Tensor"),
        ({"image": b"a.jpg"}, "image must be .* got bytes"),
        ({"vocabulary": None}, "vocabulary must be a list of classes"),
        ({"vocabulary": [1]}, "must be a string or a list of strings, got 1"),
        ({"encoder": None}, "encoder must be a name or a path, got None"),
        ({"pretrained": None}, "pretrained must be a name or a path"),
        ({"templates": 3}, "templates must be a name or a path"),
        ({"device": 3.5}, "device must be"),
        ({"device": "gpu"}, "device must be"),
        ({"prob_threshold": "0.5"}, "prob_threshold must be a number, got '0.5'"),
        ({"prob_threshold": None}, "prob_threshold must be a number"),
        ({"logit_scale": "x"}, "logit_scale must be a number"),
        ({"area_threshold": [0.1]}, "area_threshold must be a number"),
        ({"precision": None}, "precision must be one of"),
    ],
)
def test_arguments_of_wrong_types_are_named(tiny_model, wrong, message):
    encoder, pretrained = tiny_model
    arguments = {"image": reference_image(8, 8), "vocabulary": "cat; dog", "encoder": encoder, "pretrained": pretrained}
    with pytest.raises(ValueError, match=message):
        spar_d2.segment(**{**arguments, **wrong})
