"""`train --dry-run` estimates a distillation and writes nothing; a training soon says how long it takes."""

import logging
import os
import re
import sys

import pytest

from reference import ROOT
from spar_d2.cli import train
from spar_d2.engine.dry_run import estimate, report
from spar_d2.engine.trainer import Trainer


@pytest.fixture
def many_windows(photo_cfg):
    """The photos at a size of several windows."""
    photo_cfg.SPAR.DATA.SCALE_RANGE, photo_cfg.SPAR.DATA.CROP_PROB, photo_cfg.SPAR.TEACHER.STRIDE = (1.0, 1.0), 0.0, 8
    return photo_cfg


def test_costs_follow_from_images_and_windows(many_windows, tmp_path):
    photo_cfg = many_windows
    photo_cfg.SOLVER.MAX_ITER = 30
    before = sorted(os.walk(tmp_path))
    costs = estimate(photo_cfg)
    assert sorted(os.walk(tmp_path)) == before
    assert (costs.images, costs.steps, costs.batch, costs.epochs) == (3, 30, 2, 20.0)
    assert costs.windows == 2 < costs.planned
    assert costs.seconds == pytest.approx(30 * costs.step_seconds)
    assert 0 < costs.teacher_seconds < costs.step_seconds and costs.memory > 2**26
    text = report(photo_cfg, costs)
    assert (
        "3 in " in text and "30 of 2 images, 20.0 epochs" in text and "none (SPAR.TEACHER.CACHE_DIR is empty)" in text
    )


def test_a_cache_saves_time_and_takes_space(many_windows, tmp_path):
    photo_cfg = many_windows
    photo_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE, photo_cfg.SPAR.DATA.FROZEN = 0, True
    photo_cfg.SPAR.TEACHER.CACHE_DIR, photo_cfg.SOLVER.MAX_ITER = str(tmp_path / "cache"), 3000
    costs = estimate(photo_cfg)
    assert costs.windows == costs.planned > 2
    assert costs.seconds < 3000 * costs.step_seconds
    assert not (tmp_path / "cache").exists()
    # Half-precision features of a grid of at least 4 by 4 cells each.
    assert costs.target_bytes > 3 * 16 * 2 * 32
    assert f"for all images in {tmp_path / 'cache'}" in report(photo_cfg, costs)
    assert "every image is used 2000 times" in report(photo_cfg, costs)


def test_only_a_distillation_is_estimated(photo_cfg):
    photo_cfg.SPAR.DISTILL.ENABLED = False
    with pytest.raises(ValueError, match=r"--dry-run .*SPAR\.DISTILL\.ENABLED"):
        estimate(photo_cfg)


def test_the_command_prints_the_estimate(photo_folder, tiny_model, tmp_path, monkeypatch, capsys):
    config = ["--config-file", str(ROOT / "configs/distill/Base-distill.yaml"), "--dry-run", "MODEL.DEVICE", "cpu"]
    config += ["MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1], "SPAR.DATA.EPOCHS", "8"]
    config += ["SPAR.DATA.SCALE_BOX", "(192,96)", "SPAR.DATA.MIN_SHORT_SIDE", "64", "SPAR.DATA.CROP_MIN_SIDE", "48"]
    output = tmp_path / "never"
    config += ["SPAR.DATA.IMAGES", str(photo_folder), "OUTPUT_DIR", str(output)]
    monkeypatch.setattr(sys, "argv", ["train", *config])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    assert any("24 of 1 images, 8.0 epochs" in line for line in lines) and lines[-1] == "Nothing was written."
    assert not output.exists()
    monkeypatch.setattr(sys, "argv", ["train", "--resume", *config])
    with pytest.raises(SystemExit):
        train.main()
    assert "--dry-run" in capsys.readouterr().err


def test_the_remaining_time_is_logged_after_three_steps(photo_cfg, caplog):
    photo_cfg.SOLVER.MAX_ITER = 5
    caplog.set_level(logging.INFO, logger="spar_d2.engine.hooks")
    Trainer(photo_cfg).train()
    messages = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Step ")]
    assert len(messages) == 1
    assert re.fullmatch(r"Step 3: \S+ s per step, about 0:00:0\d left", messages[0])
