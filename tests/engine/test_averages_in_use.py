"""A run with moving averages, and everything that takes its checkpoint."""

import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from safetensors.torch import load_file

from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.encoders import EncoderSpec, build_encoder, describe_encoder
from spar_d2.encoders.convert import convert_weights
from spar_d2.encoders.origin import read_origin
from spar_d2.engine.trainer import STUDENT_FILE, Trainer

MEAN = (0.5, 0.4, 0.3)


@pytest.fixture
def run(photo_cfg):
    """The config of a finished run, its checkpoint, the averages and the weights of the last step."""
    photo_cfg.SPAR.EMA_DECAY = 0.5
    photo_cfg.MODEL.SPAR.PIXEL_MEAN = MEAN
    photo_cfg.MODEL.SPAR.QUICK_GELU = True
    trainer = Trainer(photo_cfg)
    trainer.train()
    raw = trainer._module.backbone.encoder.state_dict()
    student = load_file(os.path.join(photo_cfg.OUTPUT_DIR, STUDENT_FILE))
    assert any(not torch.equal(student[name], tensor) for name, tensor in raw.items())
    return photo_cfg, os.path.join(photo_cfg.OUTPUT_DIR, "model_final.pth"), student, raw


def matches(encoder, tensors):
    return all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.slow
def test_all_users_of_a_checkpoint_take_the_averages_except_a_resumed_run(run, caplog):
    cfg, checkpoint, student, raw = run
    name = cfg.MODEL.SPAR.ENCODER
    with caplog.at_level("WARNING"):
        encoder = build_encoder(name, checkpoint)
    assert matches(encoder, student)
    assert "EMA weights (SPAR.EMA_DECAY)" in caplog.text
    converted = convert_weights(EncoderSpec(name, checkpoint), text=cfg.MODEL.SPAR.PRETRAINED)
    assert all(torch.equal(student[key], tensor) for key, tensor in converted.items() if key.startswith("visual."))
    for checkpointer in (Checkpointer, DetectionCheckpointer):  # --student, DefaultPredictor
        model = build_model(cfg)
        checkpointer(model).load(checkpoint)
        assert matches(model.backbone.encoder, student)
    model = build_model(cfg)  # --eval-only --resume
    Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load("", resume=True)
    assert matches(model.backbone.encoder, student)

    cfg.MODEL.WEIGHTS = checkpoint  # a new run
    new = Trainer(cfg)
    new.resume_or_load(resume=False)
    assert matches(new._module.backbone.encoder, student)
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert matches(resumed._module.backbone.encoder, raw)

    for file in (checkpoint, os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE)):
        info, origin = describe_encoder(name, file), read_origin(file)
        assert (info.pixel_mean, info.quick_gelu) == (MEAN, True)
        assert (origin.window, origin.stride) == (64, cfg.SPAR.TEACHER.STRIDE)


def test_averages_of_no_weight_are_damage(tiny_model, tmp_path, reference_clip):
    trainer = {"hooks": {"ModelEma": {"averages": {"backbone.encoder.visual.proj": torch.zeros(2)}}}}
    model = {f"backbone.encoder.{name}": tensor for name, tensor in reference_clip.state_dict().items()}
    torch.save({"model": model, "trainer": trainer}, tmp_path / "c.pth")
    with pytest.raises(RuntimeError, match=r"its EMA weight 'backbone\.encoder\.visual\.proj' matches no weight"):
        build_encoder(tiny_model[0], str(tmp_path / "c.pth"))
