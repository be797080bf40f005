"""Export to ONNX: one file for every size and any classes, and the files beside it."""

import json
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from reference import ROOT, TINY_CONFIG, example_encoder
from spar_d2.encoders import FAMILIES, build_encoder
from spar_d2.encoders.positions import sampling_weights
from spar_d2.export import check, check_sizes, compare, export_onnx
from spar_d2.export import onnx as exporter

TINY = str(ROOT / "configs/toy/tiny_clip.json")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_one_file_is_right_at_every_size(name, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_REPEATS", 0)
    torch.manual_seed(0)
    encoder = example_encoder(name)
    # An export takes seconds for each block. SigLIP's last block is like the others.
    del encoder.blocks[: -1 if name == "SigLIP" else -2]
    export_onnx(encoder, tmp_path / "a.onnx")
    sizes = check_sizes(encoder)
    assert len(sizes) == 8 and (1024, 1024) in sizes
    if name != "open_clip ViT":
        sizes[sizes.index((1024, 1024))] = (512, 512)
    for comparison in compare(tmp_path / "a.onnx", encoder, sizes):
        assert comparison.difference < 1e-4 and comparison.cosine > 1 - 1e-6, comparison
    assert encoder.training is False and all(p.device.type == "cpu" for p in encoder.parameters())


@pytest.mark.slow
def test_scores_for_any_number_of_images_and_classes(tmp_path):
    torch.manual_seed(0)
    encoder, path = example_encoder("open_clip ViT"), tmp_path / "scores.onnx"
    del encoder.blocks[:-1]
    export_onnx(encoder, path, "scores")
    session = onnxruntime.InferenceSession(str(path))
    assert [value.name for value in session.get_inputs()] == ["image", "text"]
    assert [value.name for value in session.get_outputs()] == ["scores"]
    stored = session.get_modelmeta().custom_metadata_map
    assert json.loads(stored["spar_d2.patch_size"]) == encoder.patch_size
    assert json.loads(stored["spar_d2.pixel_mean"]) == pytest.approx(encoder.pixel_mean)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    for batch, classes, size in [(1, 1, (64, 64)), (3, 7, (50, 90)), (2, 150, (1, 1))]:
        pixels = torch.randint(0, 256, (batch, 3, *size)).float()
        text = F.normalize(torch.randn(classes, encoder.embed_dim), dim=1)
        (found,) = session.run(None, {"image": pixels.numpy(), "text": text.numpy()})
        with torch.no_grad():
            features = encoder((pixels / 255 - mean) / std)
        expected = torch.einsum("bdhw,qd->bqhw", F.normalize(features, dim=1), text)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("margin", "antialias"), [(0.0, False), (0.1, False), (0.0, True)])
def test_weights_without_known_sizes_are_those_of_interpolate(margin, antialias):
    from spar_d2.encoders.positions import _symbolic_weights

    for grid in [(1, 1), (4, 4), (4, 7), (3, 4), (37, 2), (5, 100)]:
        arguments = ((4, 4), grid, margin, torch.device("cpu"), antialias)
        found = _symbolic_weights(*arguments)
        native = grid == (4, 4)
        expected = (torch.eye(4), torch.eye(4)) if native else sampling_weights(*arguments)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_the_command_writes_classes_and_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("spar_d2.export.check_sizes", lambda encoder: [(1, 1), (40, 70)])
    config = tmp_path / "one-block.json"
    config.write_text(json.dumps(TINY_CONFIG | {"vision_cfg": TINY_CONFIG["vision_cfg"] | {"layers": 1}}))
    words = ["--encoder", config, "--output", tmp_path / "a.onnx", "--scores"]
    words += ["--vocabulary", "cat, kitten; dog", "--templates", "simple", "--precision", "int8", "--check"]
    monkeypatch.setattr(sys, "argv", ["spar-d2 export", "onnx", *map(str, words)])
    assert import_module("spar_d2.cli.export").main() == 0
    printed = capsys.readouterr().out
    assert "70x40" in printed and "a.safetensors" in printed
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["classes"] == [{"name": "cat", "synonyms": ["cat", "kitten"]}, {"name": "dog", "synonyms": ["dog"]}]
    model = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    assert json.loads(model.get_modelmeta().custom_metadata_map["spar_d2.precision"]) == "int8"
    stored = load_file(tmp_path / "a.safetensors")
    assert stored["query_class"].tolist() == [0, 0, 1] and stored["text"].shape == (3, content["embed_dim"])
    assert stored["text"].norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.pt"], "--output must end with .onnx"),
        (["--output", "a.onnx", "--encoder", "ViT-B-61"], "ViT-B-61"),
        (["--output", "a.onnx", "--pretrained", "nowhere.pt"], "nowhere.pt"),
        (
            ["--output", "a.onnx", "--encoder", "vit_nano_patch8_dinov2", "--vocabulary", "cat"],
            "vit_nano_patch8_dinov2",
        ),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spar-d2 export", "onnx", "--encoder", TINY, *words])
    with pytest.raises(SystemExit) as stopped:
        import_module("spar_d2.cli.export").main()
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch):
    encoder = build_encoder(TINY, reference_compat=True)
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.REFERENCE_COMPAT"):
        export_onnx(encoder, tmp_path / "a.onnx")
    monkeypatch.setattr(exporter, "_LARGEST_BYTES", 1000)
    with pytest.raises(ValueError, match="GB for one ONNX file"):
        export_onnx(build_encoder(TINY), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
