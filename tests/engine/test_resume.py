"""A run that is stopped and resumed ends as if it had not been; so does one in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from processes import run_in_two_processes
from reference import ROOT
from small_trainers import Crash, assert_equal
from spar_d2.engine.trainer import STUDENT_FILE, Trainer


@pytest.fixture
def cfg(photo_cfg):
    photo_cfg.SPAR.EMA_DECAY = 0.8
    photo_cfg.SOLVER.MAX_ITER = 8
    photo_cfg.SOLVER.CHECKPOINT_PERIOD = 3
    photo_cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    photo_cfg.SOLVER.WARMUP_ITERS = 2
    return photo_cfg


def train(cfg, folder, resume=False, stop_at=None) -> dict:
    """Final checkpoint of a run, which may be stopped after an iteration and is not resumed here."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    os.makedirs(folder, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if stop_at is not None:
        trainer.register_hooks([Crash(stop_at)])
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        return {}
    trainer.train()
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, -1])
@pytest.mark.parametrize("mode", ["sampled", "cached", "bfloat16"])
def test_bit_for_bit(cfg, tmp_path, mode, seed, monkeypatch):
    if mode == "cached":
        cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 0
        cfg.SPAR.DATA.FROZEN = True
        cfg.SPAR.TEACHER.CACHE_DIR = str(tmp_path / "cache")
    if mode == "bfloat16":
        cfg.SOLVER.AMP.ENABLED = True
        cfg.MODEL.SPAR.PRECISION = "bfloat16"
    cfg.SEED = seed
    if seed < 0:  # the run that is compared with must draw the same; a resumed one takes it from its checkpoint
        monkeypatch.setattr("detectron2.utils.comm.shared_random_seed", lambda: 1234)
    through = train(cfg, tmp_path / "through")
    train(cfg, tmp_path / "stopped", stop_at=7)
    monkeypatch.setattr("detectron2.utils.comm.shared_random_seed", lambda: 99)
    resumed = train(cfg, tmp_path / "stopped", resume=True)
    if mode == "cached":  # what was kept before the stop is not encoded again
        for state in (through, resumed):
            del state["trainer"]["hooks"]["DistillationHook"]
    assert_equal(through, resumed)
    students = [(tmp_path / name / STUDENT_FILE).read_bytes() for name in ("through", "stopped")]
    assert students[0] == students[1]
    assert through["trainer"]["hooks"]["ModelEma"]["averages"]


@pytest.mark.slow
def test_other_seeds_train_otherwise(cfg, tmp_path):
    first = train(cfg, tmp_path / "a")["model"]
    cfg.SEED = 4
    assert any(not torch.equal(value, first[name]) for name, value in train(cfg, tmp_path / "b")["model"].items())


def command(cfg, folder, *launcher) -> subprocess.CompletedProcess:
    """The command line, with the config as a file."""
    config = folder / "config.yaml"
    folder.mkdir()
    config.write_text(cfg.dump())
    arguments = ["--config-file", str(config), "OUTPUT_DIR", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(ROOT / "tools" / "train_net.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def train_a_half(rank: int, folder: Path, config: str) -> None:
    cfg = CfgNode.load_cfg(config)
    cfg.OUTPUT_DIR = str(folder / "run")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("average", ["image", "cell"])
def test_two_processes_train_as_one(cfg, tmp_path, average):
    """Sums are taken in another order, so that float32 weights differ by rounding: by 1e-6 at most.

    With SGD: for weights whose true gradient is zero (a key's bias), Adam scales up the rounding alone.
    """
    cfg.SOLVER.MAX_ITER = 4
    cfg.SPAR.OPTIMIZER = "SGD"
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SPAR.DISTILL.AVERAGE = average
    alone = train(cfg, tmp_path / "alone")
    if average == "image":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = command(cfg, tmp_path / "two", *launcher)
        assert done.returncode == 0, done.stderr[-3000:]
    else:  # to be quick: from the processes that torchrun would start
        (tmp_path / "two").mkdir()
        run_in_two_processes(train_a_half, tmp_path / "two", cfg.dump())
    together = torch.load(tmp_path / "two" / "run" / "model_final.pth", weights_only=True)
    assert together["iteration"] == alone["iteration"] == 3
    start = Trainer.build_model(cfg).state_dict()
    moved = max((value - start[name]).abs().max().item() for name, value in alone["model"].items())
    assert moved > 0.01
    for name, value in alone["model"].items():
        torch.testing.assert_close(together["model"][name], value, rtol=0, atol=1e-6)
    assert (tmp_path / "two" / "run" / STUDENT_FILE).is_file()


def test_flags_of_processes_are_refused_under_torchrun(cfg, monkeypatch):
    from spar_d2.engine.launch import check_launch

    with pytest.raises(ValueError, match="under torchrun.*--num-gpus"):
        check_launch(2, 1, 0, under_torchrun=True)


@pytest.mark.slow
def test_what_a_resumed_run_changes_is_named(cfg, tmp_path, caplog):
    train(cfg, tmp_path / "run", stop_at=7)
    for key, value in (("SPAR.OPTIMIZER", "SGD"), ("MODEL.SPAR.TRAINABLE", "all")):
        other = cfg.clone()
        other.merge_from_list([key, value])
        with pytest.raises(ValueError, match=rf"--resume: {key} was .* and cannot be changed to '{value}'"):
            train(other, tmp_path / "run", resume=True)
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 1, "SPAR.EMA_DECAY", 0.0, "SEED", 8])
    train(cfg, tmp_path / "run", resume=True)
    for words in (
        "SOLVER.IMS_PER_BATCH was changed from 2",
        "SPAR.EMA_DECAY was changed from 0.8",
        "instead of SEED 8",
    ):
        assert words in caplog.text


@pytest.mark.slow
def test_a_run_that_begins_anew_is_not_resumed_from_an_earlier_one(cfg, tmp_path):
    train(cfg, tmp_path / "run")
    cfg.SEED = 9
    train(cfg, tmp_path / "run", stop_at=1)
    again = cfg.clone()
    again.OUTPUT_DIR = str(tmp_path / "run")
    trainer = Trainer(again)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert (tmp_path / "run" / "last_checkpoint.previous").read_text() == "model_final.pth"
