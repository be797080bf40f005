"""Model folders: written once, read by this package, open_clip, timm and torch.hub."""

import json
import sys
from importlib import import_module
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from reference import ROOT
from spar_d2.encoders import EncoderSpec, build_encoder, build_text_tower, describe_encoder
from spar_d2.encoders.origin import Origin
from spar_d2.encoders.weights import write_safetensors
from spar_d2.engine.setup import load_config
from spar_d2.export import export_folder

DINO = "vit_tiny_patch16_224"  # one that timm can load, too


@pytest.fixture
def clip(tiny_model, tmp_path):
    """Model folder of the tiny CLIP."""
    files = export_folder(EncoderSpec(*tiny_model), tmp_path / "tiny-clip", "MIT")
    assert {file.name for file in files} == {"model.safetensors", "config.json", "open_clip_config.json", "README.md"}
    return str(tmp_path / "tiny-clip")


@pytest.fixture
def dino(tmp_path):
    """Model folder of a student of a timm model."""
    torch.manual_seed(0)
    encoder = build_encoder(DINO)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    origin = Origin(DINO, "augreg_in21k_ft_in1k", (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), None, 64, 24, "smoothed", 110, 600)
    tensors = {name.removeprefix("visual."): tensor for name, tensor in encoder.state_dict().items()}
    write_safetensors(tensors, tmp_path / "student.safetensors", origin)
    export_folder(EncoderSpec(DINO, str(tmp_path / "student.safetensors"), readout="value"), tmp_path / "dino")
    return str(tmp_path / "dino")


def test_a_folder_is_used_like_a_model_name(clip, tiny_model, tmp_path):
    image = torch.randn(1, 3, 40, 70)
    expected = build_encoder(*tiny_model)
    assert torch.equal(build_encoder(clip)(image), expected(image))
    assert describe_encoder(clip) == describe_encoder(*tiny_model)
    towers = [build_text_tower(clip), build_text_tower(*tiny_model)]
    ours, theirs = (tower.encode(["a cat"]) for tower in towers)
    assert torch.equal(ours, theirs)
    # Other weights, such as those of a student, may be given.
    other = tmp_path / "other.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in expected.state_dict().items()}, other)
    assert not torch.equal(build_encoder(clip, str(other))(image), expected(image))


def test_open_clip_reads_a_folder(clip, tiny_model):
    model = open_clip.create_model(f"local-dir:{clip}")
    for name, tensor in build_encoder(*tiny_model).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_timm_reads_a_folder_and_the_read_out_is_kept(dino, tmp_path):
    ours = build_encoder(dino)
    expected = build_encoder(DINO, str(tmp_path / "student.safetensors"), readout="value")
    image = torch.randn(1, 3, 40, 70)
    assert torch.equal(ours(image), expected(image))
    assert ours.pixel_mean == (0.5, 0.4, 0.3)
    trunk = timm.create_model(f"local-dir:{dino}", pretrained=True)
    assert tuple(trunk.pretrained_cfg["mean"]) == (0.5, 0.4, 0.3)
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[f"visual.{name}"]), name


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_pe_core_tiny_patch16_384", "flexivit_small"])
def test_timm_reads_models_of_any_size(name, tmp_path):
    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=0).eval()
    save_file(expected.state_dict(), tmp_path / "w.safetensors")
    export_folder(EncoderSpec(name, str(tmp_path / "w.safetensors")), tmp_path / "model")
    found = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    image = torch.randn(1, 3, *expected.patch_embed.img_size)
    with torch.inference_mode():
        assert torch.equal(found.forward_features(image), expected.forward_features(image))
    for key in ("input_size", "fixed_input_size"):
        assert found.pretrained_cfg[key] == expected.pretrained_cfg[key]


def test_folders_of_one_name_are_models_of_their_own(clip, tiny_model, tmp_path):
    image = torch.randn(1, 3, 24, 24)
    expected, tower = build_encoder(*tiny_model), build_text_tower(*tiny_model).encode(["a cat"])
    save_file(expected.state_dict(), tmp_path / "image.safetensors")
    # Layers of the text tower, and texts for the tokenizer.
    for number, change in enumerate([{"layers": 1}, {"layers": 1, "context_length": 20}]):
        config = json.loads(Path(clip, "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"] |= change
        other = tmp_path / str(number) / "tiny-clip"
        other.mkdir(parents=True)
        (other / "open_clip_config.json").write_text(json.dumps(config))
        config = str(other / "open_clip_config.json")
        text = build_text_tower(config, "").encode(["a cat"])
        assert text.shape == tower.shape and not torch.equal(text, tower)
        assert torch.equal(build_encoder(config, str(tmp_path / "image.safetensors"))(image), expected(image))
    assert torch.equal(build_text_tower(clip).encode(["a cat"]), tower)


def test_torch_hub_loads_a_folder(clip):
    encoder = torch.hub.load(str(ROOT), "spar_encoder", clip, source="local")
    image = torch.randn(1, 3, 24, 24)
    assert torch.equal(encoder(image), build_encoder(clip)(image))


def test_the_card_tells_how_the_weights_came_about(dino, clip):
    card = Path(dino, "README.md").read_text()
    for part in (DINO, "augreg_in21k_ft_in1k", "smoothed", "64 pixels, 24 pixels", "110, 600", "timm.create_model"):
        assert part in card, part
    card = Path(clip, "README.md").read_text()
    assert "license: MIT" in card and "teacher" not in card and "open_clip.create_model" in card


def test_configs_take_a_folder(clip, tmp_path):
    (tmp_path / "model.yaml").write_text("MODEL:\n  SPAR:\n    ENCODER: tiny-clip\n")
    cfg = load_config(str(tmp_path / "model.yaml"), ["OUTPUT_DIR", str(tmp_path)])
    # The weights of a base are those of another encoder.
    (tmp_path / "base.yaml").write_text("MODEL:\n  SPAR:\n    PRETRAINED: laion2b_s34b_b88k\n")
    (tmp_path / "model.yaml").write_text("_BASE_: base.yaml\nMODEL:\n  SPAR:\n    ENCODER: tiny-clip\n")
    cfg = load_config(str(tmp_path / "model.yaml"), ["OUTPUT_DIR", str(tmp_path)])
    assert cfg.MODEL.SPAR.PRETRAINED == f"{clip}/model.safetensors"
    other = ["MODEL.SPAR.PRETRAINED", "student.safetensors"]
    assert load_config(str(tmp_path / "model.yaml"), other).MODEL.SPAR.PRETRAINED == "student.safetensors"
    # The paths of files, so that caches notice new weights.
    assert cfg.MODEL.SPAR.PRETRAINED == f"{clip}/model.safetensors"
    assert cfg.MODEL.SPAR.ENCODER == f"{clip}/open_clip_config.json"


def test_folders_of_open_clip_are_read(clip, tiny_model, tmp_path):
    folder = tmp_path / "from-a-hub"
    folder.mkdir()
    for old, new in [("model.safetensors", "open_clip_model.safetensors"), ("open_clip_config.json",) * 2]:
        (tmp_path / "tiny-clip" / old).rename(folder / new)
    image = torch.randn(1, 3, 24, 24)
    assert torch.equal(build_encoder(str(folder))(image), build_encoder(*tiny_model)(image))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has neither a config.json"),
        ("{", "is not valid JSON"),
        ({"spar_d2": {"encoder": "../other"}}, "must name a model"),
        ({"spar_d2": {"encoder": "/etc/model.json"}}, "must name a model"),
        ({"spar_d2": {"encoder": ["ViT-B-16"]}}, "must name a model"),
        ({"spar_d2": {"encoder": "ViT-B-16"}}, "has no model.safetensors"),
    ],
)
def test_wrong_folders_are_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_encoder(str(tmp_path))


def test_nothing_of_others_is_replaced(tiny_model, tmp_path):
    spec = EncoderSpec(*tiny_model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder"):
        export_folder(spec, tmp_path / "mine")
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    with pytest.raises(ValueError, match="random weights"):
        export_folder(EncoderSpec(tiny_model[0]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    export_folder(spec, tmp_path / "new")
    export_folder(spec, tmp_path / "new")
    with pytest.raises(ValueError, match="must not overwrite"):
        export_folder(EncoderSpec(str(tmp_path / "new")), tmp_path / "new")


def test_the_command(tiny_model, tmp_path, monkeypatch, capsys):
    words = ["folder", "--encoder", tiny_model[0], "--pretrained", tiny_model[1], "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["spar-d2 export", *words])
    assert import_module("spar_d2.cli.export").main() == 0
    assert "model.safetensors" in capsys.readouterr().out
