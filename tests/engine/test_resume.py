"""Resumed runs end like uninterrupted ones, and runs in two processes like those in one."""

import os
import socket
from pathlib import Path

import pytest
import torch

from processes import start_tool
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
@pytest.mark.parametrize(
    ("mode", "seed"), [("sampled", 3), ("sampled", -1), ("cached", 3), ("cached", -1), ("bfloat16", 3)]
)
def test_a_resumed_run_ends_like_an_uninterrupted_one_bit_for_bit(cfg, tmp_path, mode, seed, monkeypatch):
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
    if mode == "cached":  # targets cached before the stop are not encoded again
        for state in (through, resumed):
            del state["trainer"]["hooks"]["DistillationHook"]
    assert_equal(through, resumed)
    students = [(tmp_path / name / STUDENT_FILE).read_bytes() for name in ("through", "stopped")]
    assert students[0] == students[1]
    assert through["trainer"]["hooks"]["ModelEma"]["averages"]


@pytest.mark.slow
def test_another_seed_gives_another_student(cfg, tmp_path):
    first = train(cfg, tmp_path / "a")["model"]
    cfg.SEED = 4
    assert any(not torch.equal(value, first[name]) for name, value in train(cfg, tmp_path / "b")["model"].items())


def train_in_two_processes(cfg, folder: Path) -> None:
    """The command line in the processes and with the variables that torchrun would give it, but started sooner."""
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", folder / "config.yaml", "OUTPUT_DIR", folder / "run"]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(start_tool(ROOT / "tools" / "train_net.py", arguments, folder / f"log{rank}", variables))
    for rank, process in enumerate(processes):
        process.join(300)
        assert process.exitcode == 0, (folder / f"log{rank}").read_text()[-3000:]


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
    train_in_two_processes(cfg, tmp_path / "two")
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

    with pytest.raises(ValueError, match="--num-gpus"):
        check_launch(2, 1, 0, under_torchrun=True)


@pytest.mark.slow
def test_changed_settings_of_a_resumed_run_are_named(cfg, tmp_path, caplog):
    train(cfg, tmp_path / "run", stop_at=7)
    for key, value in (("SPAR.OPTIMIZER", "SGD"), ("MODEL.SPAR.TRAINABLE", "all")):
        other = cfg.clone()
        other.merge_from_list([key, value])
        with pytest.raises(ValueError, match=rf"--resume: {key} .*'{value}'"):
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
def test_a_run_that_starts_over_is_not_resumed_from_an_earlier_one(cfg, tmp_path):
    train(cfg, tmp_path / "run")
    cfg.SEED = 9
    train(cfg, tmp_path / "run", stop_at=1)
    again = cfg.clone()
    again.OUTPUT_DIR = str(tmp_path / "run")
    trainer = Trainer(again)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert (tmp_path / "run" / "last_checkpoint.previous").read_text() == "model_final.pth"
