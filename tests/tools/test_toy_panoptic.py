"""The panoptic demo, cut short."""

import json
import sys

import pytest
from PIL import Image

from reference import ROOT
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from tool_modules import load_tool

WEIGHTS = ROOT / "configs/toy/tiny_clip.safetensors"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, 4))
    monkeypatch.setitem(SCENE_SPLITS, "val", (303, 2))
    tool = load_tool("toy/panoptic")
    monkeypatch.setattr(tool, "SHOWN_SCENES", (0, 1))

    def call(*arguments: str) -> None:
        short = ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
        few = ["INPUT.MIN_SIZE_TEST", "64", "TEST.DETECTIONS_PER_IMAGE", "3", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"]
        monkeypatch.setattr(sys, "argv", ["panoptic.py", *arguments, *short, *few])
        tool.main()

    return call


@pytest.mark.slow
def test_it_compares_three_encoders_and_draws_them(run, tmp_path, capsys):
    out = tmp_path / "out"
    run("--student", str(WEIGHTS), "--output", str(out))
    table = (out / "table.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == ["untrained encoder", "pre-trained", "SPAR student"]
    assert table.strip() in capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert all(0 <= values["PQ"] <= 100 for values in scores.values())
    # One of these is the other here.
    assert scores["pre-trained"]["PQ"] == scores["SPAR student"]["PQ"]
    with Image.open(out / "panoptic.png") as picture:
        assert min(picture.size) > 500
    run("--student", str(WEIGHTS), "--output", str(out), "--resume")
    assert json.loads((out / "scores.json").read_text()) == scores


def test_without_a_student(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--student", str(tmp_path / "none.safetensors"), "--output", str(tmp_path / "out"))
    assert "tools/run_demo.py" in capsys.readouterr().err
