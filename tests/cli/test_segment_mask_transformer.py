"""`spar-d2 segment` and `spar-d2 visualize` with a MaskTransformer: learned classes and words, things and stuff."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from own_sets import forget, panoptic_set, semantic_set
from reference import ROOT, reference_image
from spar_d2.cli.__main__ import main
from spar_d2.data.datasets.file_registration import register_dataset_file
from spar_d2.demo.ground_truth import truth_reader
from spar_d2.demo.panoptic import build_demo
from spar_d2.engine.setup import load_config
from tool_modules import exit_code

TOY = str(ROOT / "configs/toy/mask_transformer.yaml")
NODE = "MODEL.MASK_TRANSFORMER"
# Random weights are unsure.
LOOSE = [f"{NODE}.OBJECT_THRESHOLD", "0.0", f"{NODE}.OVERLAP_THRESHOLD", "0.0", f"{NODE}.QUERIES", "12"]
SMALL = [*LOOSE, "MODEL.SPAR.TEMPLATES", "simple", f"{NODE}.WIDTH", "32", f"{NODE}.BLOCKS", "1"]
WORDS = [*SMALL, f"{NODE}.CLASSIFIER", "text"]
SEMANTIC = [f"{NODE}.TASK", "semantic", "DATASETS.TRAIN", "('spar_scenes_train',)"]
SEMANTIC += ["DATASETS.TEST", "('spar_scenes_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "13"]


@pytest.fixture
def segment(monkeypatch, tmp_path):
    """Runs the command on a photo in an empty folder, with the weights of a random model; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(reference_image(71, 103)).save("photo.png")
    tool = import_module("spar_d2.cli.segment")

    def call(overrides, *flags):
        torch.manual_seed(0)
        state = build_model(load_config(TOY, overrides)).state_dict()
        if "classifier.no_object.bias" in state:
            state["classifier.no_object.bias"] -= 10  # otherwise, random queries see nothing
        torch.save({"model": state}, "model.pth")
        words = ["--config-file", TOY, "--weights", "model.pth", "--input", "photo.png", "--output", "out", "--json"]
        return exit_code(tool, monkeypatch, *words, "--masks", *flags, "--opts", *overrides)

    return call


def results(folder):
    return json.loads((folder / "out/photo.json").read_text()), np.asarray(Image.open(folder / "out/photo_mask.png"))


def test_learned_classes_are_those_of_the_data_set(segment, tmp_path, capsys):
    assert segment(SMALL, "--panoptic") == 0
    record, mask = results(tmp_path)
    metadata = MetadataCatalog.get("spar_scenes_panoptic_val")
    names = ["background", *metadata.stuff_classes[1:], *metadata.thing_classes]
    assert record["vocabulary"] == [[name] for name in names]
    assert mask.shape == (71, 103) and len(np.unique(mask)) > 1
    assert {one["number"]: one["name"] for one in record["classes"]} == {n: names[n] for n in np.unique(mask).tolist()}
    assert "random" not in capsys.readouterr().err


@pytest.mark.parametrize("in_file", [False, True])
def test_words_are_things_and_stuff(segment, tmp_path, in_file):
    text = "things: cat, kitten; dog; stuff: sky; grass, meadow"
    (tmp_path / "classes.txt").write_text(text.replace("; ", "\n"))
    assert segment(WORDS, "--panoptic", "--vocabulary", "classes.txt" if in_file else text) == 0
    record, mask = results(tmp_path)
    assert record["vocabulary"] == [["background"], ["sky"], ["grass", "meadow"], ["cat", "kitten"], ["dog"]]
    names = ["background", "sky", "grass", "cat", "dog"]
    assert {one["name"] for one in record["classes"]} == {names[n] for n in np.unique(mask)} > {"background"}
    assert len({tuple(one["color"]) for one in record["classes"]}) == len(record["classes"])


def test_words_of_the_semantic_task(segment, tmp_path):
    assert segment([*WORDS, *SEMANTIC], "--vocabulary", "sky; grass, meadow; cat", "--export", "coco") == 0
    record, mask = results(tmp_path)
    assert record["vocabulary"] == [["sky"], ["grass", "meadow"], ["cat"]]
    assert mask.max() <= 2 and (tmp_path / "out/coco.json").is_file()


def test_only_things_or_only_stuff(segment, tmp_path):
    for vocabulary, words in (("things: cat; dog", ["cat", "dog"]), ("stuff: sky", ["sky"])):
        assert segment(WORDS, "--vocabulary", vocabulary) == 0
        assert results(tmp_path)[0]["vocabulary"] == [["background"], *([word] for word in words)]


def test_segments_are_those_of_the_model(segment, tmp_path):
    """Class numbers of the model, things from 0 and stuff from 1, are mapped to names."""
    assert segment(SMALL) == 0
    demo = build_demo(load_config(TOY, SMALL), ["overlay"], "model.pth")
    image = reference_image(71, 103)
    seen = demo.see(image)
    x = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy())
    with torch.no_grad():
        ids, segments = demo.model([{"image": x, "height": 71, "width": 103}])[0]["panoptic_seg"]
    assert np.array_equal(ids.numpy(), seen.segments) and len(segments) > 1
    metadata = MetadataCatalog.get("spar_scenes_panoptic_val")
    for one in segments:
        names = metadata.thing_classes if one["isthing"] else metadata.stuff_classes
        (number,) = np.unique(seen.labels[ids.numpy() == one["id"]])
        assert demo.names[number] == names[one["category_id"]]


@pytest.mark.parametrize(
    ("overrides", "flags", "message"),
    [
        (SMALL, ["--vocabulary", "things: cat"], "this MaskTransformer model has a fixed set of classes; remove"),
        (WORDS, ["--vocabulary", "cat; dog"], 'the headings "things:" and "stuff:"'),
        (WORDS, ["--vocabulary", "things:; stuff:"], "the vocabulary is empty"),
        (WORDS, ["--vocabulary", "none.txt"], "there is no vocabulary file none.txt"),
        (WORDS, ["--examples", "a.yaml"], "--examples: the classes of MaskTransformer must be words"),
        ([*SMALL, *SEMANTIC], ["--panoptic"], "--panoptic: --config-file must have a panoptic model"),
        (SMALL, ["--export", "coco"], "only masks can be exported of a panoptic model"),
        (SMALL, ["--show", "pca"], "--show must be overlay for MaskTransformer"),
        ([*SMALL, "DATASETS.TEST", "('spar_cityscapes_panoptic_val',)"], [], "8 things and 5 stuff classes; 'spar"),
    ],
)
def test_mistakes_are_one_line(segment, tmp_path, capfd, overrides, flags, message):
    assert segment(overrides, *flags) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_panoptic_needs_a_panoptic_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(reference_image(20, 30)).save("photo.png")
    with pytest.raises(SystemExit):
        main(["segment", "--input", "photo.png", "--panoptic", "--vocabulary", "things: cat"])
    assert "got a config of OpenVocabularySegmentor" in capsys.readouterr().err


@pytest.fixture(params=["panoptic", "words", "semantic"])
def own(request, tmp_path):
    """Name and overrides of an own data set, in each task, with classes from its file."""
    panoptic = request.param != "semantic"
    path = (panoptic_set if panoptic else semantic_set)(tmp_path)
    name = "boats" if panoptic else "beach"
    counts = ["MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
    overrides = [*(SMALL if request.param == "panoptic" else WORDS), *counts, "SPAR.DATA.REGISTER", str(path)]
    task = [] if panoptic else [f"{NODE}.TASK", "semantic", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "255"]
    yield name, [*overrides, *task, "DATASETS.TRAIN", f"{name}_train", "DATASETS.TEST", f"{name}_val"]
    forget()


def test_predictions_beside_the_ground_truth(own, tmp_path, capsys):
    name, overrides = own
    flags = ["--dataset", f"{name}_val", "--output", str(tmp_path / "drawn")]
    main(["visualize", "--config-file", TOY, *flags, "--opts", *overrides])
    assert f"2 pictures of {name}_val" in capsys.readouterr().out
    assert len(list((tmp_path / "drawn").iterdir())) == 3
    demo = build_demo(load_config(TOY, overrides), ["overlay"])
    truth = truth_reader(demo, f"{name}_val")(DatasetCatalog.get(f"{name}_val")[0])
    names = [*demo.names, "(ignored)"]
    assert names[truth.labels[30, 12]] == "boat" and names[truth.labels[5, 5]] == "sand"


def test_words_that_are_not_those_of_the_ground_truth(tmp_path):
    register_dataset_file(panoptic_set(tmp_path))
    try:
        demo = build_demo(load_config(TOY, [*WORDS, "MODEL.SPAR.VOCABULARY", "things: boat; stuff: sea"]), ["overlay"])
        with pytest.raises(ValueError, match=r'MODEL.SPAR.VOCABULARY must be "" here'):
            truth_reader(demo, "boats_val")
    finally:
        forget()
