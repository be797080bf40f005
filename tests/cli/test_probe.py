"""The command for linear probes side by side, on a few scenes."""

import json
import os
import signal
import sys
from importlib import import_module

import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image
from safetensors.torch import load_file

from reference import ROOT
from spar_d2.comparison import methods as comparison
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.encoders.weights import write_safetensors
from spar_d2.engine.hooks import StepSeed
from spar_d2.modeling.probe_segmentor import ProbeSegmentor

QUICK = ["SOLVER.MAX_ITER", "4", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "1", "SEED", "0"]
QUICK += ["SPAR.TEACHER.STRIDE", "40", "DATASETS.TEST", "('spar_scenes_tune',)"]
QUICK += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
VOC = str(ROOT / "configs/linear_probe/voc21.yaml")
SINGLE, SLIDING, STUDENT = (
    "pre-trained, single pass",
    "pre-trained, sliding window, stride 40",
    "SPAR student, single pass",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def student(tmp_path):
    """The demo's encoder with its last block changed a little."""
    weights = load_file(ROOT / "configs/toy/tiny_clip.safetensors")
    weights = {name: w.float() * (1.1 if "resblocks.4" in name else 1) for name, w in weights.items()}
    write_safetensors(weights, tmp_path / "student.safetensors")
    return str(tmp_path / "student.safetensors")


@pytest.fixture
def probe(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(drawn))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, 4))
    monkeypatch.setitem(SCENE_SPLITS, "tune", (202, 3))
    tool = import_module("spar_d2.cli.probe")

    def run(*arguments, opts=()):
        output = ["--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["probe", *arguments, *output, *QUICK, *opts])
        tool.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def no_picture(monkeypatch):
    """Draw no predictions, which takes longer than the rest: data sets without colors have no picture."""
    monkeypatch.delattr(MetadataCatalog.get("spar_scenes_tune"), "stuff_colors")


@pytest.fixture
def work(monkeypatch):
    """Counts of training steps and of tested images."""
    done = {"steps": 0, "tested": 0}
    before_step, forward = StepSeed.before_step, ProbeSegmentor.forward

    def step(self):
        done["steps"] += 1
        before_step(self)

    def look(self, inputs):
        done["tested"] += not self.training
        return forward(self, inputs)

    monkeypatch.setattr(StepSeed, "before_step", step)
    monkeypatch.setattr(ProbeSegmentor, "forward", look)
    return done


def rows_of(text) -> dict[str, list[str]]:
    lines = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    return {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines[1:]}


@pytest.mark.slow
def test_three_rows_become_a_table_and_a_picture_and_are_reused(probe, work, student, tmp_path, request):
    printed = probe("--student", student)
    out = tmp_path / "out"
    table = (out / "table.md").read_text()
    assert table in printed
    rows = rows_of(table)
    assert list(rows) == [SINGLE, SLIDING, STUDENT]
    assert rows[SLIDING][3] == "1.0x"
    assert len({cells[0] for cells in rows.values()}) > 1
    frozen = sum(p.numel() for p in torch.load(out / "student" / "model_final.pth")["model"].values()) - 1933 - 257
    assert f"- {STUDENT}: 1,933 parameters trained, {frozen:,} frozen" in table
    assert printed.count(f"  1,933 parameters trained, {frozen:,} frozen") == 3
    records = json.loads((out / "table.json").read_text())
    assert [record["method"] for record in records] == list(rows)
    assert {(record["images"], record["trained parameters"]) for record in records} == {(3, 1933)}
    assert [f"{record['scores']['mIoU']:.1f}" for record in records] == [cells[0] for cells in rows.values()]
    with Image.open(out / "predictions.png") as picture:
        assert min(picture.size) > 400
    # One more for each evaluation, to warm up, and three for the picture.
    assert work == {"steps": 12, "tested": 3 * (1 + 3 + 3)}

    work.update(steps=0, tested=0)
    assert rows_of(probe("--student", student)) == rows
    assert work == {"steps": 0, "tested": 3 * 3}

    request.getfixturevalue("no_picture")
    probe("--rows", "single_pass", opts=["SOLVER.BASE_LR", "1e-2"])
    assert work["steps"] == 4
    probe("--rows", "single_pass", opts=["SOLVER.BASE_LR", "1e-2", "SOLVER.CHECKPOINT_PERIOD", "9"])
    assert work["steps"] == 4


@pytest.mark.slow
@pytest.mark.usefixtures("no_picture")
def test_the_students_features_are_probed_and_those_of_a_changed_student_again(probe, work, student, tmp_path):
    probe("--rows", "student", "--student", student)
    probed = torch.load(tmp_path / "out" / "student" / "model_final.pth")["model"]
    name = "visual.transformer.resblocks.4.mlp.c_fc.weight"
    assert torch.equal(probed[f"backbone.encoder.{name}"], load_file(student)[name])
    weights = {name: w * 1.1 for name, w in load_file(student).items()}
    write_safetensors(weights, student)
    probe("--rows", "student", "--student", student)
    assert work["steps"] == 8


@pytest.mark.slow
@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("resume", [True, False])
def test_training_stopped_by_ctrl_c_resumes(probe, work, monkeypatch, tmp_path, resume):
    before_step = StepSeed.before_step

    def press(self):
        before_step(self)
        if self.trainer.iter == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StepSeed, "before_step", press)
        with pytest.raises(SystemExit, match="--resume"):
            probe("--rows", "single_pass")
    assert work["steps"] == 2
    probe("--rows", "single_pass", *["--resume"] * resume)
    assert work["steps"] == (4 if resume else 6)
    if resume:
        first = torch.load(tmp_path / "out" / "single_pass" / "model_final.pth")["model"]
        (tmp_path / "out" / "single_pass" / "probe.json").write_text("{")
        probe("--rows", "single_pass")
        again = torch.load(tmp_path / "out" / "single_pass" / "model_final.pth")["model"]
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.usefixtures("no_picture")
def test_ctrl_c_in_testing_keeps_the_probe_and_other_settings_start_over(probe, work, monkeypatch):
    def stop(*arguments, **keys):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        patch.setattr(comparison.SemanticEvaluator, "process", stop)
        probe("--rows", "single_pass")
    assert work["steps"] == 4
    probe("--rows", "single_pass", "--resume")
    assert work["steps"] == 4
    probe("--rows", "single_pass", "--resume", opts=["SOLVER.BASE_LR", "1e-2"])
    assert work["steps"] == 8


@pytest.mark.parametrize(
    ("arguments", "opts", "message"),
    [
        (["--rows", "student"], [], "--student FILE"),
        (["--student", "nowhere.safetensors"], [], "--student: nowhere.safetensors"),
        ([], ["DATASETS.TRAIN", "('voc21_train',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "13"], " 21"),
        (["--config-file", VOC], ["DATASETS.TEST", "('voc21',)"], "voc21_train: 0 of 1464 training images are prep"),
        (["--config-file", "none.yaml"], [], "--config-file: "),
        ([], ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "12"], "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        ([], ["DATASETS.TEST", "()"], "DATASETS.TEST"),
        ([], ["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "MODEL.META_ARCHITECTURE"),
        ([], ["MODEL.SPAR.INFERENCE", "sliding_window"], "MODEL.SPAR.INFERENCE"),
        ([], ["MODEL.WEIGHTS", "x.pth"], "MODEL.WEIGHTS"),
        ([], ["SPAR.EMA_DECAY", "0.9"], "SPAR.EMA_DECAY"),
        (
            [],
            ["INPUT.RANDOM_FLIP", "horizontal", "SPAR.PROBE.CACHE_DIR", "x"],
            "INPUT.RANDOM_FLIP",
        ),
    ],
)
def test_wrong_flags_are_one_line(probe, arguments, opts, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        probe(*arguments, opts=opts)
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()
