"""Classes by example: from regions of images to labels."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from reference import ROOT
from spar_d2 import segment
from spar_d2.comparison.protocol import check_vocabulary
from spar_d2.engine.setup import load_config
from spar_d2.modeling.example_embeddings import _cell_means, cluster_means
from spar_d2.text import Vocabulary

NANO = "vit_nano_patch8_dinov2"
COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 180, 40)}


def striped(names, seed, vertical=True):
    """An image of noisy stripes of 48 pixels, and its label map with values from 1."""
    rng = np.random.default_rng(seed)
    pixels = np.concatenate([np.full((96, 48, 3), COLORS[name]) for name in names], axis=1)
    labels = np.repeat([[[*COLORS].index(name) + 1 for name in names]], 48, axis=1).repeat(96, axis=0)
    pixels = np.clip(pixels + rng.integers(-25, 26, pixels.shape), 0, 255).astype(np.uint8)
    labels = labels.astype(np.uint8)
    return (pixels, labels) if vertical else (pixels.swapaxes(0, 1).copy(), labels.T.copy())


def save(folder, name, names, seed, vertical=True):
    pixels, labels = striped(names, seed, vertical)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(labels).save(folder / f"{name}_labels.png")
    return pixels, labels


@pytest.fixture
def file(tmp_path):
    """An examples file of three classes: by mask, by box, and by point."""
    save(tmp_path, "a", ["red", "blue"], seed=0)
    save(tmp_path, "b", ["blue", "green"], seed=1)
    content = {
        "center": True,
        "classes": [
            {"name": "red", "examples": [{"image": "a.png", "mask": "a_labels.png", "value": 1}]},
            {"name": "blue", "examples": [{"image": "a.png", "boxes": [[48, 0, 96, 96]]}]},
            {"name": "green", "examples": [{"image": "b.png", "points": [[70, 20], [60, 80]]}]},
        ],
    }
    (tmp_path / "examples.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "examples.yaml"


def share(labels, truth):
    return float((labels == truth - 1).mean())


def test_the_examples_are_found_again_and_so_are_the_classes_in_another_image(file, tmp_path):
    for name, names, vertical in (("a", ["red", "blue"], True), ("c", ["green", "red", "blue"], False)):
        _, truth = save(tmp_path, name, names, seed=0 if name == "a" else 7, vertical=vertical)
        result = segment(tmp_path / f"{name}.png", str(file), NANO, "")
        assert result.names == ["red", "blue", "green"]
        assert share(result.labels, truth) > 0.9, name


def test_class_vectors_are_means_of_normalized_features_inside_the_mask(file):
    from spar_d2.encoders import build_encoder

    examples = [{"image": file.parent / "a.png", "mask": file.parent / "a_labels.png", "value": 1}]
    vocabulary = Vocabulary.from_examples({"red": examples, "blue": [{**examples[0], "value": 2}]})
    cfg = config(file, vocabulary=False)
    model = build_model(cfg).eval()
    classes = model.class_vectors(vocabulary)
    encoder = build_encoder(NANO)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    pixels = torch.from_numpy(np.asarray(Image.open(examples[0]["image"])).copy()).permute(2, 0, 1) / 255
    with torch.no_grad():
        features = F.normalize(encoder(((pixels - mean) / std)[None])[0], dim=0)  # (D, 12, 12)
    for number, columns in enumerate((slice(0, 6), slice(6, 12))):
        expected = F.normalize(features[:, :, columns].flatten(1).mean(1), dim=0)
        torch.testing.assert_close(classes.vectors[number], expected, rtol=1e-4, atol=1e-5)
    assert classes.query_class.tolist() == [0, 1] and classes.center is None


def config(file, *more, vocabulary=True):
    keys = ["MODEL.SPAR.ENCODER", NANO, "MODEL.SPAR.PRETRAINED", "", "INPUT.MIN_SIZE_TEST", 0]
    keys += ["MODEL.SPAR.VOCABULARY", str(file) if vocabulary else ""]
    cfg = load_config(str(ROOT / "configs/toy/distill.yaml"), [*keys, *more])
    cfg.defrost()
    cfg.DATASETS.TEST = ()
    return cfg


@pytest.mark.parametrize("output", ["labels", "scores"])
@pytest.mark.parametrize(("inference", "order"), [("single_pass", "BGR"), ("sliding_window", "RGB")])
def test_the_segmentor_takes_examples_from_the_config_and_from_each_image(file, output, inference, order):
    keys = ["MODEL.SPAR.OUTPUT", output, "MODEL.SPAR.INFERENCE", inference, "INPUT.FORMAT", order]
    model = build_model(config(file, *keys)).eval()
    pixels, truth = striped(["green", "red", "blue"], seed=7)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    inputs = {"image": image.flip(0) if order == "BGR" else image}
    other = Vocabulary.from_examples({"any": [{"image": file.parent / "a.png", "points": [[1, 1]]}]})
    first, second = model([inputs, {**inputs, "vocabulary": other}])
    if output == "labels":
        assert share(first["sem_seg_labels"].numpy(), truth) > 0.9
        assert second["sem_seg_labels"].unique().tolist() == [0]
    else:
        assert first["sem_seg"].shape == (3, 96, 144)
        assert share(first["sem_seg"].argmax(0).numpy(), truth) > 0.9


def test_class_vectors_follow_the_weights_in_training(file):
    model = build_model(config(file)).eval()
    before = model.class_vectors(model.vocabulary).vectors
    assert model.class_vectors(model.vocabulary).vectors is before
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert not torch.allclose(model.class_vectors(model.vocabulary).vectors, before)


def test_class_vectors_of_a_model_in_training_are_not_cached_on_disk(tiny_model, file, tmp_path):
    keys = ["MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1]]
    for trainable, files in (("last_blocks:1", 0), ("none", 1)):
        options = [*keys, "MODEL.SPAR.TEXT_CACHE", str(tmp_path / "cache"), "MODEL.SPAR.TRAINABLE", trainable]
        model = build_model(config(file, *options)).eval()
        model.class_vectors(model.vocabulary)
        assert len(list((tmp_path / "cache").rglob("examples_*"))) == files


def test_classes_may_have_examples_and_words(tiny_model, file):
    image = {"image": file.parent / "a.png", "boxes": [[0, 0, 40, 96]]}
    mixed = Vocabulary.from_examples(
        [{"name": "red", "examples": [image], "words": ["red", "scarlet"]}, {"name": "sky", "words": "sky"}]
    )
    cfg = config(file, "MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1], vocabulary=False)
    model = build_model(cfg).eval()
    classes = model.class_vectors(mixed)
    assert classes.query_class.tolist() == [0, 0, 0, 1]
    text, _ = model.embeddings(Vocabulary(["red", "scarlet", "sky"]))
    torch.testing.assert_close(classes.vectors[[0, 1, 3]], text)
    with pytest.raises(ValueError, match="no text tower"):
        segment(file.parent / "a.png", mixed, NANO, "")


def test_vectors_of_examples_are_cached_by_content(tiny_model, file, tmp_path, monkeypatch):
    keys = ["MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1]]
    keys += ["MODEL.SPAR.TEXT_CACHE", str(tmp_path / "text"), "MODEL.SPAR.TRAINABLE", "none"]
    model = build_model(config(file, *keys)).eval()
    first = model.class_vectors(model.vocabulary)
    assert len(list((tmp_path / "text").glob("examples_*.safetensors"))) == 1
    again = build_model(config(file, *keys)).eval()
    with monkeypatch.context() as patch:
        patch.setattr(again, "_encode_example", None)
        cached = again.class_vectors(again.vocabulary)
    for name in ("vectors", "query_class", "center"):
        assert torch.equal(getattr(cached, name), getattr(first, name))
    # Another mask and another inference mode give other vectors.
    mask = np.asarray(Image.open(file.parent / "a_labels.png"))
    Image.fromarray(mask[:, ::-1].copy()).save(file.parent / "a_labels.png")
    model.set_vocabulary(str(file))
    assert not torch.equal(model.class_vectors(model.vocabulary).vectors, first.vectors)
    sliding = build_model(config(file, *keys, "MODEL.SPAR.INFERENCE", "sliding_window")).eval()
    sliding.class_vectors(sliding.vocabulary)
    assert len(list((tmp_path / "text").glob("examples_*.safetensors"))) == 3


def test_clusters_describe_classes_of_several_looks():
    torch.manual_seed(0)
    centers = F.normalize(torch.randn(3, 16), dim=1)
    cells = F.normalize(centers.repeat(50, 1) + torch.randn(150, 16) * 0.05, dim=1)
    means = cluster_means(cells, 3)
    assert (means @ centers.T).max(1).values.min() > 0.99 and (means @ centers.T).max(0).values.min() > 0.99
    assert torch.equal(cluster_means(cells, 3), means)
    assert cluster_means(cells[:1].repeat(9, 1), 4).shape == (1, 16)
    torch.testing.assert_close(cluster_means(cells, 1)[0], F.normalize(cells.mean(0), dim=0))


@pytest.mark.parametrize("covered", [(64, 80), (70.5, 83.25), (90, 64.1)])
def test_coverage_of_cells_is_exact(covered):
    rng = np.random.default_rng(0)
    region = torch.from_numpy(rng.random((61, 64)) < 0.4).double()
    found = _cell_means(region, torch.Size((8, 10)), (covered[0] / 8, covered[1] / 10))
    fine = 40  # samples per cell and axis
    rows, columns = (torch.arange(n * fine).add(0.5) * side / (n * fine) for n, side in zip((8, 10), covered))
    padded = F.pad(region, (0, 64, 0, 64))
    sampled = padded[rows.long()][:, columns.long()]
    expected = sampled.reshape(8, fine, 10, fine).mean((1, 3)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_test_images_that_are_examples_are_reported(file, caplog):
    name = f"examples_{file.parent.name}"
    DatasetCatalog.register(name, lambda: [{"file_name": str(file.parent / "b.png")}])
    MetadataCatalog.get(name).set(stuff_classes=["red", "blue", "green"])
    try:
        with caplog.at_level(logging.WARNING, "spar_d2"):
            check_vocabulary(config(file), name)
        assert "1 test images" in caplog.text
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


WRONG = [
    ({"classes": []}, "classes must be a list"),
    ({"classes": [3]}, "class 0 must have the keys"),
    ({"classes": [{"examples": []}]}, "class 0: name must be a string"),
    ({"classes": [{"name": "a"}]}, "class 'a' must have examples or words"),
    ({"classes": [{"name": "a", "words": "a"}, {"name": "A", "words": "b"}]}, "names must be unique"),
    ({"classes": [{"name": "a", "words": "a", "color": 1}]}, "unknown key 'color'"),
    ({"clases": []}, "unknown key 'clases'"),
    ({"classes": [{"name": "a", "examples": [{"image": "a.png"}]}]}, "must have a mask, boxes or points"),
    ({"classes": [{"name": "a", "examples": [{"image": "no.png", "points": [[1, 1]]}]}]}, "no file .*no.png"),
    ({"classes": [{"name": "a", "examples": [{"image": "a.png", "points": [[1]]}]}]}, "points must be a list"),
    ({"classes": [{"name": "a", "examples": [{"image": "a.png", "boxes": [[5, 0, 5, 9]]}]}]}, "boxes must be"),
    ({"classes": [{"name": "a", "examples": [{"image": "a.png", "points": [[1, 1]], "value": 2}]}]}, "value must be"),
    ({"classes": [{"name": n, "examples": [{"image": "a.png", "points": [[1, 1]]}]} for n in "ab"]}, "also an example"),
    ({"classes": [{"name": "a", "words": "a,,b"}]}, "words must be"),
    ({"classes": [{"name": "a", "words": "a"}], "center": True}, "center must be false"),
    ({"classes": [{"name": "a", "words": "a"}], "clusters": 0}, "clusters must be an integer in 1"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_mistakes_in_the_file_are_named(file, content, message):
    file.write_text(yaml.safe_dump(content))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"examples\.yaml.*{message}"):
        Vocabulary.load(str(file))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"mask": "small.png"}, "mask .* is 5x4, but its image is 96x96"),
        ({"mask": "a.png"}, "a.png"),
        ({"mask": "a_labels.png", "value": 9}, "empty .*value 9"),
        ({"mask": "zeros.png"}, "empty .*all values except 0"),
        ({"boxes": [[200, 200, 300, 300]]}, "empty"),
        ({"points": [[500, 1]]}, "outside"),
    ],
)
def test_regions_that_cannot_be_used_are_named(file, example, message):
    Image.fromarray(np.ones((4, 5), np.uint8)).save(file.parent / "small.png")
    Image.fromarray(np.zeros((96, 96), np.uint8)).save(file.parent / "zeros.png")
    content = {"classes": [{"name": "a", "examples": [{"image": "a.png", **example}]}]}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        segment(file.parent / "a.png", str(file), NANO, "")


def test_the_file_may_be_a_path_with_any_suffix(file):
    upper = file.rename(file.with_name("EXAMPLES.YAML"))
    assert Vocabulary.of(upper).names == Vocabulary.load(str(upper)).names == ["red", "blue", "green"]


@pytest.mark.parametrize(
    "text", ["center: true\ncenter: false\nclasses: []", "[1, 2]", "a: [", "!!python/object:os.system x"]
)
def test_files_that_are_no_examples_are_refused(file, text):
    file.write_text(text)
    with pytest.raises(ValueError, match=r"examples.*examples\.yaml"):
        Vocabulary.load(str(file))


def test_the_command_segments_by_example(file, tmp_path, monkeypatch, capsys):
    from spar_d2.cli import segment as command

    save(tmp_path, "c", ["green", "red"], seed=9)
    words = ["--input", str(tmp_path / "c.png"), "--examples", str(file), "--output", str(tmp_path / "out"), "--masks"]
    words += ["--config-file", str(ROOT / "configs/toy/distill.yaml"), "--opts", "MODEL.SPAR.ENCODER", NANO]
    words += ["MODEL.SPAR.PRETRAINED", "", "INPUT.MIN_SIZE_TEST", "0", "MODEL.DEVICE", "cpu"]
    monkeypatch.setattr("sys.argv", ["segment", *words])
    command.main()
    labels = np.asarray(Image.open(tmp_path / "out" / "c_mask.png"))
    assert share(labels, striped(["green", "red"], 9)[1]) > 0.9
    monkeypatch.setattr("sys.argv", ["segment", *words[:4], "--vocabulary", "cat", *words[4:]])
    with pytest.raises(SystemExit):
        command.main()
    assert "--examples and --vocabulary" in capsys.readouterr().err
