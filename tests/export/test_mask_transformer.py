"""Export of a MaskTransformer to ONNX: the outputs of the model at every size, with learned classes and words."""

import json
import re
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from safetensors.torch import load_file

from reference import ROOT, TINY_CONFIG, reference_image
from spar_d2.engine.setup import load_config
from spar_d2.export import check
from spar_d2.export.check import compare_module
from spar_d2.modeling.banded_upsampling import covered_size
from spar_d2.modeling.mask_transformer.exported import class_inputs, export_mask_transformer
from spar_d2.modeling.mask_transformer.readout import Queries

TOY = str(ROOT / "configs/toy/mask_transformer.yaml")
NODE = "MODEL.MASK_TRANSFORMER"
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")


@pytest.fixture
def overrides(tmp_path):
    """A small model; an export takes seconds for each block."""
    path = tmp_path / "two-blocks.json"
    path.write_text(json.dumps(TINY_CONFIG | {"vision_cfg": TINY_CONFIG["vision_cfg"] | {"layers": 2}}))
    encoder = ["MODEL.DEVICE", "cpu", "MODEL.SPAR.ENCODER", str(path), "MODEL.SPAR.PRETRAINED", ""]
    size = {"QUERIES": 6, "WIDTH": 32, "BLOCKS": 1, "HEADS": 2, "OBJECT_THRESHOLD": 0.0, "OVERLAP_THRESHOLD": 0.0}
    head = [str(part) for key, value in size.items() for part in (f"{NODE}.{key}", value)]
    return [*encoder, *head, "MODEL.SPAR.TEMPLATES", "simple"]


def build(overrides, *more):
    torch.manual_seed(0)
    model = build_model(load_config(TOY, [*overrides, *more])).eval()
    if model.vocabulary is not None:
        model.classifier.no_object.bias.data -= 10
    return model


def run(path, **inputs):
    return onnxruntime.InferenceSession(str(path)).run(None, inputs)


def pixels(height, width, *numbers):
    return np.stack([reference_image(height, width, number).transpose(2, 0, 1) for number in numbers]).astype("f4")


def segmented(model, logits, masks, image, things):
    """Panoptic segmentation from exported outputs, by the code of the model."""
    encoder, size = model.backbone.encoder, image.shape[-2:]
    covered = covered_size(encoder.grid(*size), encoder.patch_size, size, size)
    probabilities = torch.from_numpy(logits).softmax(-1)
    return Queries(probabilities, torch.from_numpy(masks), covered, size, things).panoptic(0.0, 0.0)


def same_as_model(model, logits, masks, images):
    """Whether the outputs give the model's segmentation; a few pixels at borders may differ by rounding."""
    things = model.things if model.vocabulary is None else model.vocabulary.things
    for image, *outputs in zip(images, logits, masks):
        found, segments = segmented(model, *outputs, image, things)
        # INPUT.FORMAT is BGR.
        expected, expected_segments = model([{"image": torch.from_numpy(image[::-1].copy())}])[0]["panoptic_seg"]
        assert (found == expected).float().mean() > 0.999 and len(segments) > 0
        kinds = [[(s["isthing"], s["category_id"]) for s in part] for part in (segments, expected_segments)]
        assert kinds[0] == kinds[1]


@pytest.mark.slow
def test_learned_classes_at_every_size(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_REPEATS", 0)
    model, path = build(overrides), tmp_path / "a.onnx"
    patch = model.backbone.encoder.patch_size
    module = export_mask_transformer(model, path)
    sizes = [(1, 1), (patch, patch), (37, 53), (4 * patch, 4 * patch), (1, 20 * patch), (129, 70)]
    for comparison in compare_module(path, module, sizes):
        assert comparison.difference < 1e-4 and comparison.same > 0.999, comparison
    images = pixels(50, 70, 0, 1, 2)
    logits, masks = run(path, image=images)
    assert logits.shape == (3, 6, 14) and masks.shape[:2] == (3, 6)
    assert masks.shape[2:] == tuple(side * module.head.predictor.cells for side in model.backbone.encoder.grid(50, 70))
    same_as_model(model, logits, masks, images)
    stored = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(stored["spar_d2.patch_size"]) == patch


@pytest.mark.slow
def test_words_as_inputs(overrides, tmp_path):
    """One file for any classes, seen or not, with the result of the model for them."""
    model, path = build(overrides, f"{NODE}.CLASSIFIER", "text"), tmp_path / "a.onnx"
    export_mask_transformer(model, path, free_classes=True)
    for vocabulary in ("things: circle, disk; cat; stuff: grass; sky", "things: star", "stuff: a; b; c; d; e; f; g"):
        model.set_vocabulary(vocabulary)
        classes = {name: tensor.numpy() for name, tensor in class_inputs(model).items()}
        for size in ((40, 30), (33, 51)):
            images = pixels(*size, 3)
            logits, masks = run(path, image=images, **classes)
            assert logits.shape[2] == len(model.vocabulary.tested) + 1
            np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-5)
            same_as_model(model, logits, masks, images)


@pytest.mark.slow
def test_the_command_with_fixed_words_writes_classes_and_checks(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "_REPEATS", 0)
    monkeypatch.setattr("spar_d2.cli.export_mask_transformer.check_sizes", lambda encoder: [(1, 1), (40, 71)])
    more = [f"{NODE}.CLASSIFIER", "text"]
    torch.save({"model": build(overrides, *more).state_dict()}, tmp_path / "model.pth")
    words = ["--config-file", TOY, "--weights", tmp_path / "model.pth", "--output", tmp_path / "a.onnx", "--check"]
    words += ["--vocabulary", "things: star, asterisk; cat; stuff: grass", "--opts", *overrides, *more]
    monkeypatch.setattr(sys, "argv", ["spar-d2 export", "onnx", *map(str, words)])
    assert import_module("spar_d2.cli.export").main() == 0
    printed = capsys.readouterr().out
    assert "71x40" in printed and "a.safetensors" in printed
    content = json.loads((tmp_path / "a.json").read_text())
    assert [(entry["name"], entry["thing"]) for entry in content["classes"]] == [
        ("star", True),
        ("cat", True),
        ("grass", False),
    ]
    assert (content["task"], content["mask_cells"]) == ("panoptic", 4)
    stored = load_file(tmp_path / "a.safetensors")
    assert stored["query_class"].tolist() == [0, 0, 1, 2] and stored["seen"].tolist() == [True, False, True]
    model = build(overrides, *more, "MODEL.SPAR.VOCABULARY", "things: star, asterisk; cat; stuff: grass")
    images = pixels(40, 71, 1)
    same_as_model(model, *run(tmp_path / "a.onnx", image=images), images)
    the_example_of_the_documentation_runs(tmp_path, monkeypatch)


def the_example_of_the_documentation_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for suffix in (".onnx", ".json"):
        (folder / "a").with_suffix(suffix).rename((folder / "model").with_suffix(suffix))
    Image.fromarray(reference_image(40, 71, 1)).save("photo.jpg", quality=100, subsampling=0)
    page = (ROOT / "docs/deploying.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "mask_cells" in code)
    variables = {}
    exec(code, variables)
    assert variables["found"] and {name for name, *_ in variables["found"]} <= {"star", "cat", "grass"}
    assert all(mask.shape == (40, 71) and 0 <= score <= 1 for _, score, mask in variables["found"])


def test_queries_in_another_order_are_compared_with_the_same_ones():
    logits, masks = np.random.default_rng(0).normal(size=(1, 9, 4)), np.random.default_rng(1).normal(size=(1, 9, 5, 6))
    order = np.random.default_rng(2).permutation(9)
    pairs = check._in_the_same_order([(logits[:, order], logits), (masks[:, order], masks)])
    assert [check._differences(*pair)[0] for pair in pairs] == [0, 0]
    pairs = check._in_the_same_order([(logits[:, order] + 1, logits), (masks[:, order], masks)])
    assert check._differences(*pairs[0])[0] > 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.pt"], "--output must end with .onnx"),
        (["--encoder", "ViT-B-16"], "either --encoder or --config-file"),
        (["--scores"], "--scores is an output of encoders"),
        (["--weights", "nowhere.pth"], "--weights: there is no file nowhere.pth"),
        (["--vocabulary", "things: cat"], "fixed set of classes"),
        (["--config-file", str(ROOT / "configs/toy/panoptic.yaml")], "must be a config of MaskTransformer, got one of"),
        (["--opts", "MODEL.WEIGHTS", ""], "--weights or MODEL.WEIGHTS must name the checkpoint"),
        (["--opts", "DATASETS.TEST", "spar_cityscapes_panoptic_val"], "has 8 and 11"),
        (["--free-classes"], "--free-classes needs a model with MODEL.MASK_TRANSFORMER.CLASSIFIER text"),
    ],
)
def test_mistakes_are_one_line(words, message, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": build(overrides).state_dict()}, "model.pth")
    before = sorted(tmp_path.iterdir())
    base = ["--config-file", TOY, "--output", "a.onnx", *([] if "--weights" in words else ["--weights", "model.pth"])]
    if "MODEL.WEIGHTS" in words:
        base = base[:-2]
    words = [*words, *([] if "--opts" in words else ["--opts"]), *overrides]
    monkeypatch.setattr(sys, "argv", ["spar-d2 export", "onnx", *base, *words])
    with pytest.raises(SystemExit) as stopped:
        import_module("spar_d2.cli.export").main()
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder", TOY, "--weights", "a.pth"], "--weights must be used with --config-file"),
        (["--encoder", TOY, "--free-classes"], "--free-classes must be used with --config-file"),
        ([], "either --encoder or --config-file must be given"),
    ],
)
def test_flags_of_the_other_kind_are_refused(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["spar-d2 export", "onnx", "--output", "a.onnx", *flags])
    with pytest.raises(SystemExit):
        import_module("spar_d2.cli.export").main()
    assert message in capsys.readouterr().err


def test_a_sliding_window_is_not_exported(overrides, tmp_path):
    model = build(overrides, f"{NODE}.CLASSIFIER", "text", "MODEL.SPAR.INFERENCE", "sliding_window")
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.INFERENCE must be single_pass for an export"):
        export_mask_transformer(model, tmp_path / "a.onnx")
    assert not list(tmp_path.glob("*.onnx"))
