"""Training from images to checkpoints and a student file."""

import os
import signal

import pytest
import torch
from detectron2.engine import HookBase

from spar_d2.encoders import build_encoder
from spar_d2.engine.trainer import STUDENT_FILE, Trainer


@pytest.fixture
def cfg(photo_cfg):
    return photo_cfg


@pytest.mark.slow
def test_distills_photos_into_a_student_file(cfg, tiny_model):
    Trainer(cfg).train()
    files = set(os.listdir(cfg.OUTPUT_DIR))
    assert {STUDENT_FILE, "model_final.pth", "last_checkpoint", "metrics.json"} <= files
    assert not [name for name in files if "tmp" in name]
    student = build_encoder(tiny_model[0], os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))
    original = build_encoder(*tiny_model)
    same = {
        name: torch.equal(a, b) for (name, a), b in zip(student.state_dict().items(), original.state_dict().values())
    }
    assert not same["visual.transformer.resblocks.2.mlp.c_fc.weight"]
    assert same["visual.transformer.resblocks.0.mlp.c_fc.weight"]
    assert same["visual.proj"]


@pytest.mark.slow
def test_the_student_survives_an_evaluation_that_fails(cfg, monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        Trainer(cfg).train()
    assert os.path.exists(os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))


class PressCtrlC(HookBase):
    """Sends the signal of Ctrl-C in the middle of a step."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_from_which_the_run_resumes(cfg, capfd):
    handler = signal.getsignal(signal.SIGINT)
    first = Trainer(cfg)
    first.register_hooks([PressCtrlC(1)])
    first.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert (first.iter, os.path.exists(os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))) == (1, False)

    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    for ours, theirs in zip(second._trainer.model.parameters(), first._trainer.model.parameters()):
        assert torch.equal(ours, theirs)
    state = second._trainer.optimizer.state_dict()["state"]
    assert {float(entry["step"]) for entry in state.values()} == {2.0}
    second.train()
    assert second.iter == cfg.SOLVER.MAX_ITER
    assert os.path.exists(os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_resumed_students_teacher_is_the_original(cfg, tiny_model):
    cfg.SOLVER.MAX_ITER = 2
    Trainer(cfg).train()
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    teacher = next(hook for hook in again._hooks if type(hook).__name__ == "DistillationHook").teacher
    for ours, original in zip(teacher.encoder.parameters(), build_encoder(*tiny_model).parameters()):
        assert torch.equal(ours, original)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_images_have_the_type_and_sizes_of_the_config(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len(batch) == 2
    for record in batch:
        assert record["image"].dtype == torch.uint8
        assert all(side % 16 == 0 for side in record["image"].shape[1:])


def test_optimizer_of_the_config(cfg):
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    assert type(optimizer).__name__ == "AdamW"
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["MODEL.SPAR.TRAINABLE", "none"], r"MODEL\.SPAR\.TRAINABLE"),
        (["SPAR.OPTIMIZER", "Adamm"], r"SPAR\.OPTIMIZER"),
        (["SPAR.OPTIMIZER", "LBFGS"], r"SPAR\.OPTIMIZER"),
        (
            ["DATASETS.TEST", ("spar_scenes_val",), "MODEL.SPAR.VOCABULARY", "cat; dog"],
            r"VOCABULARY .*2 .*'spar_scenes_val' .*13",
        ),
        (["SOLVER.CHECKPOINT_PERIOD", 0], r"SOLVER\.CHECKPOINT_PERIOD"),
        (["SOLVER.BASE_LR", -1.0], r"SOLVER\.BASE_LR"),
        (["DATASETS.TEST", ("coco_2017_val",)], r"DATASETS\.TEST: .*'coco_2017_val' .*got 'coco'"),
        (["SPAR.DATA.IMAGES", ""], r"SPAR\.DATA\.IMAGES"),
        (["SOLVER.MAX_ITER", 0], r"SOLVER\.MAX_ITER"),
        (["SPAR.ACCUMULATION_STEPS", 3], r"SOLVER\.IMS_PER_BATCH .*3, got 2"),
        (["SPAR.ACCUMULATION_STEPS", 0], r"SPAR\.ACCUMULATION_STEPS"),
        (
            ["SPAR.ACCUMULATION_STEPS", 2, "SPAR.DISTILL.AVERAGE", "cell"],
            r'SPAR\.ACCUMULATION_STEPS .*AVERAGE "cell"',
        ),
        (["SPAR.DISTILL.AVERAGE", "pixel"], r"SPAR\.DISTILL\.AVERAGE"),
        (["SPAR.EMA_DECAY", 1.0], r"SPAR\.EMA_DECAY"),
        (["SPAR.KEEP_CHECKPOINTS", -1], r"SPAR\.KEEP_CHECKPOINTS"),
        (["SPAR.PICTURE_PERIOD", -1], r"SPAR\.PICTURE_PERIOD"),
        (["SPAR.DATA.MAX_DAMAGED", -1], r"SPAR\.DATA\.MAX_DAMAGED"),
        (["SPAR.TEACHER.PRECISION", "int8"], r"SPAR\.TEACHER\.PRECISION"),
        (["SPAR.DATA.SIDE_MULTIPLE", 24], r"SPAR\.DATA\.SIDE_MULTIPLE .*16"),
    ],
)
def test_wrong_keys_are_named(cfg, keys, message):
    cfg.merge_from_list(keys)
    with pytest.raises(ValueError, match=message):
        Trainer(cfg)
