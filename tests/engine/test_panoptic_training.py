"""Panoptic fine-tuning by the toy config, cut short: trained and frozen parts, and resuming."""

import logging

import pytest
import torch

from reference import ROOT
from small_trainers import assert_equal, train
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.engine.setup import load_config
from spar_d2.engine.trainer import Trainer


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def few_scenes(datasets, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, 6))


def config(folder, *overrides):
    folder.mkdir(exist_ok=True)
    short = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 2]
    small = ["INPUT.MIN_SIZE_TRAIN", "(96, 128)", "DATASETS.TEST", "()", "SEED", 5]
    path = str(ROOT / "configs/toy/panoptic.yaml")
    return load_config(path, [*short, *small, "OUTPUT_DIR", str(folder), *overrides])


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


@pytest.mark.slow
def test_counts_of_parameters_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="spar_d2"):
        trainer = Trainer(config(tmp_path / "run"))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in trainer.model.parameters())
    line = next(line for line in caplog.text.splitlines() if line.split()[:1] == ["all"])
    assert line.split() == ["all", f"{trained:,}", "of", f"{everything:,}", "trainable"]


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    train(config(tmp_path / "through"))
    train(config(tmp_path / "stopped"), stop_at=3)
    train(config(tmp_path / "stopped"), resume=True)
    finals = [torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("through", "stopped")]
    assert_equal(*finals)


@pytest.mark.slow
def test_the_decay_of_learning_rates_cannot_change_on_resume(tmp_path):
    train(config(tmp_path / "run", "SOLVER.MAX_ITER", 2))
    with pytest.raises(ValueError, match=r"--resume: SPAR\.LAYER_DECAY .*'1\.0'"):
        train(config(tmp_path / "run", "SPAR.LAYER_DECAY", 0.5), resume=True)


@pytest.mark.parametrize(("head", "count"), [("ROI_HEADS", 8), ("SEM_SEG_HEAD", 6)])
def test_wrong_numbers_of_classes_are_an_error_at_the_start(tmp_path, head, count):
    with pytest.raises(ValueError, match=rf"MODEL\.{head}\.NUM_CLASSES .*{count}, .*got 7"):
        Trainer(config(tmp_path / "run", f"MODEL.{head}.NUM_CLASSES", 7))


def test_mixed_precision_on_a_cpu_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="spar_d2"):
        Trainer(config(tmp_path / "run", "SOLVER.AMP.ENABLED", True))
    assert "training is in float32" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("()", r"DATASETS\.TRAIN"),
        ("('spar_scenes_panoptic_train', 'spar_scenes_train')", r"DATASETS\.TRAIN"),
    ],
)
def test_wrong_data_sets(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        Trainer(config(tmp_path / "run", "DATASETS.TRAIN", names))
