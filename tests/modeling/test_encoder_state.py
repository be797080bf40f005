"""A student's file in MODEL.WEIGHTS, read by Detectron2's own checkpointer, in models of any kind."""

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from reference import ROOT
from spar_d2.checkpoint.export import export_student
from spar_d2.encoders import EncoderSpec, build_encoder, find_encoder
from spar_d2.encoders.convert import convert_weights, formats_of, write_weights
from spar_d2.encoders.registry import find_family
from spar_d2.encoders.weights import write_safetensors

POOLED = str(ROOT / "configs/toy/tiny_pooled.json")


def student_of(name, folder, pretrained="", **choice):
    """A changed encoder, and its file."""
    spec = EncoderSpec(name, pretrained, **choice)
    encoder = build_encoder(name, pretrained, **choice)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    export_student(encoder, spec, folder / "student.safetensors")
    return encoder, str(folder / "student.safetensors")


def same(encoder, model):
    own = find_encoder(model).state_dict()
    return all(torch.equal(tensor, own[name]) for name, tensor in encoder.state_dict().items())


@pytest.fixture
def model(tiny_cfg):
    return build_model(tiny_cfg)


@pytest.mark.slow
def test_a_predictor_and_a_panoptic_model_take_a_student(tiny_cfg, panoptic_cfg, tiny_model, tmp_path):
    student, path = student_of(*tiny_model[:1], tmp_path, tiny_model[1])
    tiny_cfg.MODEL.WEIGHTS = panoptic_cfg.MODEL.WEIGHTS = path
    tiny_cfg.MODEL.SPAR.VOCABULARY = "cat; dog"
    predictor = DefaultPredictor(tiny_cfg)
    assert same(student, predictor.model)
    assert predictor(np.zeros((40, 50, 3), np.uint8))
    panoptic = build_model(panoptic_cfg)
    DetectionCheckpointer(panoptic).load(path)
    assert same(student, panoptic)


@pytest.mark.slow
@pytest.mark.parametrize("name", [POOLED, "vit_nano_patch8_dinov3", "tiny"])
def test_all_formats_of_all_families(tiny_cfg, tiny_model, tmp_path, name):
    name = tiny_model[0] if name == "tiny" else name
    student, path = student_of(name, tmp_path)
    tiny_cfg.MODEL.SPAR.ENCODER, tiny_cfg.MODEL.SPAR.PRETRAINED = name, ""
    for to in formats_of(find_family(name)):
        written = tmp_path / f"{to}.pth"
        write_weights(convert_weights(EncoderSpec(name, path), to), written)
        model = build_model(tiny_cfg)
        DetectionCheckpointer(model).load(str(written))
        assert same(student, model), to


def test_weights_that_fit_in_part_are_refused(model, tiny_model, tmp_path):
    part = {"visual.proj": torch.zeros(96, 64), "visual.conv1.weight": torch.zeros(96, 3, 16, 16)}
    write_safetensors(part, tmp_path / "part.safetensors")
    whole = {f"backbone.encoder.{name}": tensor for name, tensor in part.items()}
    torch.save({"model": whole}, tmp_path / "part.pth")
    for file in ("part.safetensors", "part.pth"):
        with pytest.raises(RuntimeError, match=rf"MODEL\.WEIGHTS: .*{file} does not fit the model: \d+ missing keys"):
            DetectionCheckpointer(model).load(str(tmp_path / file))


def test_weights_of_a_head_alone_leave_the_encoder_and_say_so(panoptic_cfg, tmp_path, caplog):
    model = build_model(panoptic_cfg)
    before = find_encoder(model).state_dict()["visual.proj"].clone()
    head = {name: torch.ones_like(t) for name, t in model.state_dict().items() if name.startswith("sem_seg_head.")}
    torch.save({"model": head}, tmp_path / "head.pth")
    with caplog.at_level("WARNING"):
        DetectionCheckpointer(model).load(str(tmp_path / "head.pth"))
    assert torch.equal(find_encoder(model).state_dict()["visual.proj"], before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in head.items())
    assert "has no weights for the encoder" in caplog.text


@pytest.mark.slow
def test_numbers_that_are_no_weights_are_refused_anywhere_in_a_model(panoptic_cfg, tmp_path):
    model = build_model(panoptic_cfg)
    state = model.state_dict()
    name = next(name for name, tensor in state.items() if name.startswith("sem_seg_head.") and tensor.ndim == 4)
    torch.save({"model": {**state, name: torch.full_like(state[name], float("nan"))}}, tmp_path / "bad.pth")
    with pytest.raises(RuntimeError, match=rf"MODEL\.WEIGHTS: {name} in .*NaN"):
        DetectionCheckpointer(model).load(str(tmp_path / "bad.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{"pixel_mean": (0.5, 0.5, 0.5)}, {"quick_gelu": True}])
def test_a_student_that_expects_other_images_is_refused(model, tiny_model, tmp_path, choice):
    _, path = student_of(*tiny_model[:1], tmp_path, tiny_model[1], **choice)
    key = next(iter(choice)).upper()
    with pytest.raises(RuntimeError, match=rf"MODEL\.WEIGHTS: .*set MODEL\.SPAR\.{key} to "):
        DetectionCheckpointer(model).load(path)
