"""The table of all benchmarks, as a user asks for it."""

import json
import sys
from importlib import import_module

import numpy as np
import pytest

from label_trees import make_tree
from reference import ROOT
from spar_d2.comparison.progress import Progress
from spar_d2.data.preparation import prepare

CONFIG = str(ROOT / "configs" / "segment" / "openclip_vit_b_16.yaml")


@pytest.fixture
def evaluate(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    tool = import_module("spar_d2.cli.evaluate")

    def run(*arguments, opts=()):
        keys = ["MODEL.DEVICE", "cpu", "MODEL.SPAR.ENCODER", tiny_model[0], "MODEL.SPAR.PRETRAINED", tiny_model[1]]
        keys += ["MODEL.SPAR.TEMPLATES", "simple", "DATALOADER.NUM_WORKERS", "0", *opts]
        output = ["--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *output, *map(str, arguments), "--opts", *keys])
        tool.main()

    return run


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "datasets"
    make_tree("voc20", root, np.random.default_rng(0))
    prepare("voc20", root, partial=True)


@pytest.mark.slow
def test_all_data_sets_on_disk_become_one_table(evaluate, voc, tiny_model, tmp_path, capsys):
    evaluate("--student", tiny_model[1], "--stride", "64", "--limit", "2")
    printed = capsys.readouterr()
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.strip() in printed.out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table.splitlines()[2:5]}
    assert list(rows) == [
        "pre-trained, single pass",
        "pre-trained, sliding window, stride 64",
        "SPAR student, single pass",
    ]
    single, sliding, student = ([cell.strip() for cell in row] for row in rows.values())
    assert single == student and single[0] == "-" and float(single[1]) >= 0 and sliding[6] == "-"
    assert "- VOC20: 2 of 1449 images." in table
    assert "Not found on disk: voc21, cityscapes, ade20k, context60, context59, coco_object." in table
    (line,) = [line for line in printed.err.splitlines() if line.startswith("skipped: cityscapes")]
    assert "leftImg8bit_trainvaltest.zip" in line
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [score["images"] for score in found["scores"]] == [2, 2, 2]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"table.md", "table.json", "finished.json"} <= names
    assert not any("unfinished" in name for name in names)


@pytest.mark.slow
def test_weights_of_the_config_are_the_students_and_replaced_keys_are_reported(
    evaluate, voc, tiny_model, tmp_path, capsys
):
    opts = ["MODEL.WEIGHTS", tiny_model[1], "MODEL.SPAR.LOGIT_SCALE", "3"]
    evaluate("--rows", "student", "--limit", "1", opts=opts)
    printed = capsys.readouterr()
    assert "SPAR student, single pass" in printed.out
    assert "MODEL.SPAR.LOGIT_SCALE: " in printed.err and "SPAR.TEST.PROTOCOL config" in printed.err


@pytest.mark.slow
def test_each_refinement_is_a_row_on_top_of_the_student_or_the_single_pass(evaluate, voc, tiny_model, tmp_path):
    # Small images: a propagation over pixels takes seconds at the paper's size.
    opts = ["SPAR.TEST.PROTOCOL", "config", "INPUT.MIN_SIZE_TEST", "64", "MODEL.SPAR.VOCABULARY", "voc20"]
    evaluate("--rows", "single_pass", "--refine", "lposs", "--limit", "1", opts=opts)
    student = ["--rows", "student", "--student", tiny_model[1]]
    evaluate(*student, "--refine", "lposs", "lposs,lposs+", "--limit", "1", opts=opts)
    table = (tmp_path / "out" / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == [
        "SPAR student, single pass",
        "SPAR student, single pass + lposs",
        "SPAR student, single pass + lposs,lposs+",
    ]
    finished = json.loads((tmp_path / "out" / "finished.json").read_text())
    names = [score["method"] for score in finished]
    assert "pre-trained, single pass + lposs" in names and len({score["identity"] for score in finished}) == len(names)


@pytest.mark.slow
def test_a_teacher_other_than_the_sliding_window_is_a_row(evaluate, voc, tmp_path):
    opts = ["SPAR.TEACHER.KIND", "ensemble", "SPAR.TEACHER.ENSEMBLE", "('sliding','mirror')", "SPAR.TEACHER.STRIDE", 64]
    evaluate("--limit", "1", opts=map(str, opts))
    table = (tmp_path / "out" / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == [
        "pre-trained, single pass",
        "pre-trained, sliding window, stride 64",
        "teacher, ensemble",
    ]
    evaluate("--rows", "sliding_window", "teacher", "--stride", "64", "--limit", "1")
    sliding, teacher = json.loads((tmp_path / "out" / "table.json").read_text())["scores"]
    assert teacher["method"] == "teacher, sliding" and teacher["scores"] == sliding["scores"]


@pytest.mark.slow
def test_the_message_after_ctrl_c_explains_how_to_continue(evaluate, voc, monkeypatch, tmp_path):
    def stop(*arguments, **keys):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "keep", stop)
    with pytest.raises(SystemExit, match="again"):
        evaluate("--rows", "single_pass", "--limit", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "docs/datasets.md"),
        (["--rows", "student"], "--student FILE"),
        (["--student", "nowhere.safetensors"], "--student: "),
        (["--limit", "0"], "--limit "),
        (["--rows", "sliding_window", "--refine", "lposs"], "--refine "),
        (["--refine", "crf"], "MODEL.SPAR.REFINE"),
        (["--refine", "anyup"], "MODEL.SPAR.ANYUP"),
        (["--datasets", "voc22"], "DATASETS.TEST: 'voc22' is not registered; did you mean voc2"),
        (["--datasets", "ade20k"], "ade20k"),
        (["--config-file", "none.yaml"], "--config-file: "),
    ],
)
def test_wrong_flags_are_one_line(evaluate, arguments, message, capsys):
    is_error(evaluate, arguments, (), message, capsys)


@pytest.mark.parametrize(
    ("value", "opts", "message"),
    [
        ("lposs", ["MODEL.SPAR.REFINE", "lposs+"], "MODEL.SPAR.REFINE must be empty with --refine"),
        ("anyup", ["MODEL.SPAR.ANYUP", "no.pth"], "MODEL.SPAR.ANYUP: there is no weight file no.pth"),
    ],
)
def test_wrong_keys_of_refinements_are_told_before_the_first_row(evaluate, voc, value, opts, message, capsys):
    is_error(evaluate, ["--rows", "single_pass", "--refine", value, "--limit", "1"], opts, message, capsys)


def is_error(evaluate, arguments, opts, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(*arguments, opts=opts)
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
