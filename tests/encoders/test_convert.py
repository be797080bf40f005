"""Weights in and out, for every family and file that there is."""

import json

import open_clip
import pytest
import timm
import torch

from reference import ROOT, STAND_IN, TINY_CONFIG
from spar_d2.encoders import EncoderSpec, build_encoder, build_text_tower, set_trainable
from spar_d2.encoders.convert import convert_weights, write_weights
from spar_d2.encoders.registry import build, build_text, find_family

DINOTXT = "dinov3_vitl16_dinotxt_tet1280d20h24l"
NANO_DINOV3 = "vit_nano_patch8_dinov3"


@pytest.fixture(params=["open_clip ViT", "SigLIP", "DINOv3", "DINOv3.txt"])
def spec(request, tmp_path):
    """A small model of each family, by name."""
    if request.param == "open_clip ViT":
        (tmp_path / "convert-tiny.json").write_text(json.dumps(TINY_CONFIG))
        return EncoderSpec(str(tmp_path / "convert-tiny.json"))
    if request.param == "SigLIP":
        return EncoderSpec(str(ROOT / "configs/toy/tiny_pooled.json"))
    return {
        "DINOv3": EncoderSpec(NANO_DINOV3),
        "DINOv3.txt": EncoderSpec(DINOTXT, dinov3_repo=str(STAND_IN)),
    }[request.param]


@pytest.fixture
def student(spec):
    """Changed image weights, and the model's own text weights where it has a text tower."""
    encoder = build(spec)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    text = build_text(spec).model.state_dict() if find_family(spec.name).has_text else {}
    return encoder, {**text, **encoder.state_dict()}


def with_file(spec, path):
    return EncoderSpec(spec.name, str(path), dinov3_repo=spec.dinov3_repo)


def holds(spec, encoder):
    """The file of ``spec`` gives this encoder."""
    return all(torch.equal(tensor, encoder.state_dict()[key]) for key, tensor in build(spec).state_dict().items())


FOREIGN = {
    "the library's": lambda state: state,
    "the authors' plain file": lambda state: {f"model.{key}": value for key, value in state.items()},
    "the authors' Lightning checkpoint": lambda state: {
        "epoch": 9,
        "pytorch-lightning_version": "2.5.3",
        "callbacks": {"ModelCheckpoint{'monitor': 'train_loss'}": {"best_model_path": "x.ckpt"}},
        "state_dict": {
            "segmentor.query_features": torch.zeros(3),
            **{f"segmentor.net.model.{key}": value for key, value in state.items()},
        },
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 2e-5}]}],
    },
    "distributed training's": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "a compiled model's": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "this project's Detectron2 checkpoint": lambda state: {
        "model": {f"backbone.encoder.{key}": value for key, value in state.items()} | {"head.weight": torch.zeros(2)},
        "iteration": 7,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOREIGN)
def test_files_of_other_programs_are_read(spec, student, layout, tmp_path):
    encoder, state = student
    torch.save(FOREIGN[layout](state), tmp_path / "foreign.ckpt")
    assert holds(with_file(spec, tmp_path / "foreign.ckpt"), encoder)
    if find_family(spec.name).has_text:
        text = build_text(with_file(spec, tmp_path / "foreign.ckpt")).model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in text.items())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_to_the_librarys_and_back(spec, student, suffix, tmp_path):
    encoder, state = student
    torch.save({f"model.{key}": value for key, value in state.items()}, tmp_path / "authors.pth")
    written = tmp_path / f"library{suffix}"
    write_weights(convert_weights(with_file(spec, tmp_path / "authors.pth")), written)
    assert holds(with_file(spec, written), encoder)
    if find_family(spec.name).has_text:
        again = convert_weights(with_file(spec, written), "authors")
        assert again.keys() == {f"model.{key}" for key in state}
        assert all(torch.equal(tensor, state[key.removeprefix("model.")]) for key, tensor in again.items())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_student_without_text_becomes_an_open_clip_checkpoint(tmp_path, tiny_model, suffix):
    """The student's own weights, the pre-trained model's text: open_clip loads them, and they encode alike."""
    config, pretrained = tiny_model
    student = build_encoder(config, pretrained)
    set_trainable(student, "last_blocks:2")
    with torch.no_grad():
        student.blocks[-1].mlp.c_fc.weight.add_(1)
    torch.save({"model": {f"backbone.encoder.{k}": v for k, v in student.state_dict().items()}}, tmp_path / "d2.pth")
    spec = EncoderSpec(config, str(tmp_path / "d2.pth"))
    with pytest.raises(ValueError, match="has no text tower.*--text"):
        convert_weights(spec)
    written = tmp_path / f"student{suffix}"
    write_weights(convert_weights(spec, text=pretrained), written)
    open_clip.add_model_config(config)
    library = open_clip.create_model("reference-tiny", pretrained=str(written))
    assert torch.equal(library.visual.transformer.resblocks[-1].mlp.c_fc.weight, student.blocks[-1].mlp.c_fc.weight)
    tokens = open_clip.get_tokenizer("reference-tiny")(["a cat"])
    with torch.no_grad():
        expected = build_text_tower(config, pretrained).encode(["a cat"])
        torch.testing.assert_close(library.encode_text(tokens), expected)


@pytest.mark.slow
def test_a_siglip_student_becomes_a_checkpoint_of_open_clip_and_of_timm(tmp_path):
    config = str(ROOT / "configs/toy/tiny_pooled.json")
    open_clip.add_model_config(config)
    library = open_clip.create_model("tiny_pooled", load_weights=False)
    torch.save(library.state_dict(), tmp_path / "open_clip.pt")
    spec = EncoderSpec(config, str(tmp_path / "open_clip.pt"))
    write_weights(convert_weights(spec, "open_clip"), tmp_path / "whole.safetensors")
    again = open_clip.create_model("tiny_pooled", pretrained=str(tmp_path / "whole.safetensors"))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in library.state_dict().items())
    write_weights(convert_weights(spec, "timm"), tmp_path / "trunk.safetensors")
    path = str(tmp_path / "trunk.safetensors")
    trunk = timm.create_model("vit_nano_patch8_siglip_64", num_classes=0, checkpoint_path=path)
    assert torch.equal(trunk.attn_pool.kv.weight, library.visual.trunk.attn_pool.kv.weight)
    assert torch.equal(build_encoder(config, path).visual.trunk.pos_embed, library.visual.trunk.pos_embed)
    with pytest.raises(RuntimeError, match="missing keys"):
        build_text_tower(config, path)


def test_a_dinov3_student_becomes_a_checkpoint_of_timm(tmp_path):
    encoder = build_encoder(NANO_DINOV3)
    with torch.no_grad():
        encoder.visual.norm.weight.add_(1)
    torch.save({"model": {f"backbone.encoder.{k}": v for k, v in encoder.state_dict().items()}}, tmp_path / "d2.pth")
    spec = EncoderSpec(NANO_DINOV3, str(tmp_path / "d2.pth"))
    write_weights(convert_weights(spec), tmp_path / "student.safetensors")
    path = str(tmp_path / "student.safetensors")
    trunk = timm.create_model(NANO_DINOV3, num_classes=0, checkpoint_path=path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trunk.forward_features(x)[:, 5:].transpose(1, 2).reshape(1, 128, 8, 8)
        torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="--to must be one of timm for"):
        convert_weights(spec, "open_clip")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["open_clip ViT", "SigLIP", "DINOv3", "DINOv3.txt"])
def test_weights_of_another_family_are_named(spec, student, other, tmp_path):
    """Files of each family, given to each other family."""
    family = find_family(spec.name)
    if family.name == other:
        return
    torch.save(student[1], tmp_path / "weights.pt")
    names = {
        "open_clip ViT": EncoderSpec("ViT-B-32"),
        "SigLIP": EncoderSpec(str(ROOT / "configs/toy/tiny_pooled.json")),
        "DINOv3": EncoderSpec(NANO_DINOV3),
        "DINOv3.txt": EncoderSpec(DINOTXT, dinov3_repo=str(STAND_IN)),
    }
    message = (
        rf"does not fit the model: \d+ missing keys \(.*unknown keys \(.*look like {family.name} weights \(.*ENCODER"
    )
    with pytest.raises(RuntimeError, match=message):
        build(with_file(names[other], tmp_path / "weights.pt"))


@pytest.mark.slow
def test_weights_of_another_size_are_named(tmp_path):
    torch.save(build_encoder("vit_small_patch16_dinov3").state_dict(), tmp_path / "small.pt")
    with pytest.raises(
        RuntimeError, match=r"mismatched shapes.*DINOv3 weights \(width 384, patch size 16, 12 blocks\)"
    ):
        build_encoder(NANO_DINOV3, str(tmp_path / "small.pt"))


def test_weights_of_no_family_are_named(tiny_model, tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "foreign.pt")
    with pytest.raises(RuntimeError, match="They match no known family"):
        build_encoder(tiny_model[0], str(tmp_path / "foreign.pt"))


@pytest.mark.parametrize("path", ["weights.bin", "weights", "weights.ckpt"])
def test_wrong_suffixes_are_named(path):
    with pytest.raises(ValueError, match="--output must end in one of .safetensors, .pt, .pth"):
        write_weights({"a": torch.zeros(1)}, path)
