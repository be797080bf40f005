"""Panoptic fine-tuning by the demo's config, cut short: what is trained, what is not, and going on after a stop."""

import logging

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from reference import ROOT
from small_trainers import Crash, assert_equal
from spar_d2.engine.setup import load_config
from spar_d2.engine.trainer import Trainer


def config(folder, *overrides):
    folder.mkdir(exist_ok=True)
    short = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 2]
    small = ["INPUT.MIN_SIZE_TRAIN", "(96, 128)", "DATASETS.TEST", "()", "SEED", 5]
    path = str(ROOT / "configs/toy/panoptic.yaml")
    return load_config(path, [*short, *small, "OUTPUT_DIR", str(folder), *overrides])


def train(cfg, resume=False, stop_at=None):
    # As the tools' set-up does, for the weights of the heads.
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if stop_at is None:
        trainer.train()
    else:
        trainer.register_hooks([Crash(stop_at)])
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["none", "last_blocks:1"])
def test_frozen_is_frozen(tmp_path, trainable, caplog):
    cfg = config(tmp_path / "run", "MODEL.SPAR.TRAINABLE", trainable, "SOLVER.MAX_ITER", 2)
    trainer = Trainer(cfg)
    encoder = trainer.model.backbone.net.encoder
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert (trained == 0) == (trainable == "none")
    trainer.train()
    assert not any(module.training for module in encoder.children())
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    inside = {name for name in changed if ".encoder." in name}
    assert inside == {name for name in inside if "resblocks.4." in name}
    assert bool(inside) == (trainable != "none")
    assert any("simfp_2" in name for name in changed)
    assert any("roi_heads.mask_head" in name for name in changed)


def test_counts_of_parameters_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="spar_d2"):
        trainer = Trainer(config(tmp_path / "run"))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in trainer.model.parameters())
    line = next(line for line in caplog.text.splitlines() if line.split()[:1] == ["all"])
    assert line.split() == ["all", f"{trained:,}", "of", f"{everything:,}", "trainable"]


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    train(config(tmp_path / "through"))
    train(config(tmp_path / "stopped"), stop_at=3)
    train(config(tmp_path / "stopped"), resume=True)
    finals = [torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("through", "stopped")]
    assert_equal(*finals)


@pytest.mark.slow
def test_its_own_rate_must_stay(tmp_path):
    train(config(tmp_path / "run", "SOLVER.MAX_ITER", 2))
    with pytest.raises(ValueError, match=r"--resume: SPAR\.LAYER_DECAY was '1\.0' in this run"):
        train(config(tmp_path / "run", "SPAR.LAYER_DECAY", 0.5), resume=True)


@pytest.mark.parametrize(("head", "count"), [("ROI_HEADS", 8), ("SEM_SEG_HEAD", 6)])
def test_wrong_numbers_of_classes_are_told_at_the_start(tmp_path, head, count):
    with pytest.raises(ValueError, match=rf"MODEL\.{head}\.NUM_CLASSES must be {count}, .*got 7"):
        Trainer(config(tmp_path / "run", f"MODEL.{head}.NUM_CLASSES", 7))


def test_mixed_precision_on_a_cpu_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="spar_d2"):
        Trainer(config(tmp_path / "run", "SOLVER.AMP.ENABLED", True))
    assert "training is in float32" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("()", r"DATASETS\.TRAIN must name at least one"),
        ("('spar_scenes_panoptic_train', 'spar_scenes_train')", r"only one kind of data set"),
    ],
)
def test_wrong_data_sets(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        Trainer(config(tmp_path / "run", "DATASETS.TRAIN", names))
