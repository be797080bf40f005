"""Targets computed before training are used by it."""

import logging
import sys
from importlib import import_module

import pytest

from processes import run_tool
from reference import ROOT
from spar_d2.distillation import fill_cache as caching
from spar_d2.distillation.fill_cache import fill_cache
from spar_d2.engine.trainer import Trainer


@pytest.fixture
def cfg(tiny_cfg, photo_folder, tmp_path):
    tiny_cfg.SPAR.DATA.IMAGES = str(photo_folder)
    tiny_cfg.SPAR.DATA.FROZEN = True
    tiny_cfg.SPAR.TEACHER.CACHE_DIR = str(tmp_path / "cache")
    tiny_cfg.SOLVER.MAX_ITER = 4
    return tiny_cfg


def hook_of(trainer):
    return next(hook for hook in trainer._hooks if type(hook).__name__ == "DistillationHook")


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (11, 1)])
def test_training_after_it_encodes_no_windows(cfg, seed, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    parts = [fill_cache(cfg, share, 2, show=False) for share in range(2)]
    assert sum(part.computed for part in parts) == 3
    assert all(part.damaged == part.found == 0 for part in parts)
    again = fill_cache(cfg, show=False)
    assert (again.computed, again.found) == (0, 3)
    cfg.SEED = seed
    trainer = Trainer(cfg)
    trainer.train()
    assert (hook_of(trainer).windows_encoded, hook_of(trainer).cache.misses) == (0, 0)


def test_corrupt_images_are_named_and_counted_up_to_the_limit(cfg, photo_folder, caplog):
    (photo_folder / "a.jpg").write_bytes(b"ruined")
    filled = fill_cache(cfg, show=False)
    assert (filled.computed, filled.damaged) == (2, 1)
    assert caplog.text.count("a.jpg") == 1
    (photo_folder / "b.JPG").write_bytes(b"ruined")
    cfg.SPAR.DATA.MAX_DAMAGED = 1
    with pytest.raises(RuntimeError, match=r"more than 1 "):
        fill_cache(cfg, show=False)


def test_too_little_disk_space_is_reported_before_targets_are_computed(cfg, monkeypatch, caplog):
    monkeypatch.setattr(caching, "RESERVE", 1 << 60)
    with pytest.raises(RuntimeError, match=r"CACHE_DIR: .*0\.0 GiB.*WINDOWS_PER_IMAGE"):
        fill_cache(cfg, show=False)
    with caplog.at_level(logging.WARNING):
        Trainer(cfg)
    assert "will be encoded in every epoch" in caplog.text


@pytest.mark.slow
def test_an_unwritable_cache_stops_the_command_but_no_training(cfg, monkeypatch, caplog):
    fill_cache(cfg, 0, 2, show=False)
    cfg.SPAR.TEACHER.STRIDE = 16  # another teacher has no folder there yet

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.mkdir", refuse)
        with pytest.raises(RuntimeError, match="is not writable"):
            fill_cache(cfg, show=False)
        trainer = Trainer(cfg)
    trainer.train()
    assert "no longer writing" in caplog.text
    assert not hook_of(trainer).cache.folder.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SPAR.TEACHER.CACHE_DIR", "", r"SPAR\.TEACHER\.CACHE_DIR"),
        ("SPAR.DATA.FROZEN", False, r"SPAR\.DATA\.FROZEN .*True"),
        ("MODEL.META_ARCHITECTURE", "PanopticFPN", r"MODEL\.META_ARCHITECTURE .*OpenVocabularySegmentor"),
    ],
)
def test_wrong_keys_are_named(cfg, key, value, message):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        fill_cache(cfg)


def test_training_needs_frozen_images_for_a_cache(cfg):
    cfg.SPAR.DATA.FROZEN = False
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.CACHE_DIR .*SPAR\.DATA\.FROZEN True"):
        Trainer(cfg)


@pytest.mark.processes
@pytest.mark.slow
def test_the_tool_on_two_processes(cfg, tmp_path):
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", tmp_path / "config.yaml", "--processes", "2"]
    code = run_tool(ROOT / "tools" / "fill_cache.py", arguments, tmp_path / "log")
    log = (tmp_path / "log").read_text()
    assert code == 0, log[-2000:]
    # In separate lines after the progress bars, which would be interrupted otherwise.
    lines = log.splitlines()[-2:]
    assert [line.split(",")[0] for line in lines] == ["process 0: 2 targets computed", "process 1: 1 targets computed"]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SPAR.DATA.FROZEN", "False"], "SPAR.DATA.FROZEN"),
        (["SPAR.DATA.IMAGES", "nowhere"], "SPAR.DATA.IMAGES: nowhere"),
        (["--processes", "0"], "--processes"),
        (["--machine-rank", "1"], "--machine-rank"),
    ],
)
def test_wrong_flags_of_the_tool_are_one_line(arguments, message, cfg, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(cfg.dump())
    monkeypatch.setattr(sys, "argv", ["fill_cache.py", "--config-file", str(tmp_path / "config.yaml"), *arguments])
    with pytest.raises(SystemExit) as exit_:
        import_module("spar_d2.cli.cache_teacher").main()
    assert exit_.value.code == 1
    assert f"error: {message}" in capsys.readouterr().err
