"""Output of a run, and its end after an error."""

import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from small_trainers import Crash
from spar_d2.checkpoint.checkpointer import UnsavedError
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.engine.trainer import STUDENT_FILE, Trainer


@pytest.fixture
def cfg(photo_cfg):
    return photo_cfg


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_pictures_of_one_image_in_shared_colors(cfg, channels):
    cfg.SPAR.PICTURE_PERIOD = 3
    cfg.INPUT.FORMAT = channels
    trainer = Trainer(cfg)
    trainer.train()
    folder = Path(cfg.OUTPUT_DIR) / "pictures"
    assert names(folder) == ["iter_0000002.png", "iter_0000003.png"]
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 200
    events = [path for path in Path(cfg.OUTPUT_DIR).iterdir() if path.name.startswith("events")]
    assert b"distill/teacher_student" in events[0].read_bytes()


@pytest.mark.slow
def test_the_log_and_the_metrics_file_have_all_values(cfg, caplog):
    with caplog.at_level(logging.INFO):
        Trainer(cfg).train()
    (line,) = [r.getMessage() for r in caplog.records if "cosine:" in r.getMessage()]
    for word in ("iter: 3", "images_per_second:", "windows_per_second:"):
        assert word in line
    metrics = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text()
    for name in ("total_loss", "eta_seconds", "distill/cosine", "distill/windows_encoded", "lr"):
        assert f'"{name}"' in metrics


@pytest.mark.slow
def test_periodic_evaluation_changes_no_training(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(SCENE_SPLITS, "tune", (202, 1))
    weights = []
    for period, folder in ((0, "a"), (2, "b")):
        cfg.OUTPUT_DIR = str(tmp_path / folder)
        cfg.TEST.EVAL_PERIOD = period
        cfg.DATASETS.TEST = ("spar_scenes_tune",) if period else ()
        os.makedirs(cfg.OUTPUT_DIR)
        trainer = Trainer(cfg)
        trainer.train()
        weights.append(trainer._module.backbone.encoder.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    evaluations = (tmp_path / "b" / "metrics.json").read_text().count('"sem_seg/mIoU"')
    assert evaluations == 2


@pytest.mark.slow
def test_the_average_is_evaluated_and_written(cfg, tiny_model):
    from safetensors.torch import load_file

    cfg.SPAR.EMA_DECAY = 0.5
    trainer = Trainer(cfg)
    trainer.train()
    student = load_file(os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))
    own = trainer._module.backbone.encoder.state_dict()
    name = "visual.transformer.resblocks.2.mlp.c_fc.weight"
    average = next(h for h in trainer._hooks if type(h).__name__ == "ModelEma")
    with average.applied():
        torch.testing.assert_close(student[name], own[name])
    assert not torch.allclose(student[name], own[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_nonfinite_features_stop_the_run_before_anything_is_saved(cfg, capsys, caplog):
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    trainer = Trainer(cfg)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"photos/.*jpe?g"):
        trainer.train()
    assert not [name for name in names(cfg.OUTPUT_DIR) if name.endswith((".pth", ".safetensors"))]
    assert "Traceback" not in caplog.text


@pytest.mark.slow
def test_only_the_latest_checkpoints_are_kept(cfg):
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SPAR.KEEP_CHECKPOINTS = 2
    Trainer(cfg).train()
    kept = [name for name in names(cfg.OUTPUT_DIR) if name.endswith(".pth")]
    assert kept == ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]


@pytest.mark.slow
def test_checkpoints_of_an_earlier_run_are_never_removed(cfg):
    """Not even by a run that starts over in the same folder, is stopped and resumes."""
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SPAR.KEEP_CHECKPOINTS = 1
    Trainer(cfg).train()
    folder = Path(cfg.OUTPUT_DIR)
    shutil.copy(folder / "model_0000003.pth", folder / "model_0000000.pth")
    (folder / "model_0000003.pth").rename(folder / "model_0000001.pth")
    (folder / "model_final.pth").unlink()
    theirs = (folder / "model_0000000.pth").read_bytes()
    cfg.SOLVER.MAX_ITER, cfg.SEED = 5, 17
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    trainer = Trainer(cfg)
    trainer.register_hooks([Crash(3)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert (folder / "model_0000000.pth").read_bytes() == theirs
    assert (folder / "model_0000001.pth").read_bytes() != theirs, "this one is of the later run"
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    kept = [name for name in names(cfg.OUTPUT_DIR) if name.endswith(".pth")]
    assert kept == ["model_0000000.pth", "model_0000003.pth", "model_final.pth"]


@pytest.fixture
def no_room():
    """Files of this process cannot grow beyond 100 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_failed_checkpoint_stops_the_run_only_at_the_end(cfg, no_room, caplog):
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    trainer = Trainer(cfg)
    with pytest.raises(UnsavedError, match=r"GiB.*--resume"):
        trainer.train()
    assert trainer.iter == 3, "the one after two steps did not stop it"
    assert "Continuing training without a checkpoint" in caplog.text
    assert not [name for name in names(cfg.OUTPUT_DIR) if ".tmp" in name or name.endswith(".pth")]


@pytest.mark.slow
def test_a_run_resumes_from_the_last_checkpoint_after_a_full_disk(cfg, no_room):
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    cfg.SOLVER.MAX_ITER = 2
    Trainer(cfg).train()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    cfg.SOLVER.MAX_ITER = 4
    stopped = Trainer(cfg)
    stopped.resume_or_load(resume=True)
    with pytest.raises(UnsavedError):
        stopped.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    again.train()
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))


@pytest.mark.slow
def test_corrupt_images_are_named_and_stop_the_run_beyond_the_limit(cfg, photo_folder, caplog):
    (photo_folder / "ruined.png").write_bytes(b"ruined")
    Trainer(cfg).train()
    assert caplog.text.count("ruined.png") == 1
    cfg.SPAR.DATA.MAX_DAMAGED = 0
    with pytest.raises(RuntimeError, match=r"MAX_DAMAGED"):
        Trainer(cfg).train()


@pytest.mark.slow
def test_failed_metrics_and_pictures_do_not_stop_the_run(cfg, caplog, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    cfg.SPAR.PICTURE_PERIOD = 2
    monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", refuse)
    monkeypatch.setattr("spar_d2.engine.feature_pictures.draw_panels", refuse)
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.iter == cfg.SOLVER.MAX_ITER
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))
    assert caplog.text.count("Failed to write metrics to OUTPUT_DIR") == 1
    assert "Failed to write the feature visualization" in caplog.text
