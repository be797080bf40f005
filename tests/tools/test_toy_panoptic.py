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
    # Other scripts import this one.
    monkeypatch.syspath_prepend(ROOT / "tools" / "toy")
    tool = load_tool("toy/panoptic")
    monkeypatch.setattr(tool, "SHOWN_SCENES", (0, 1))

    def call(*arguments: str, steps: str = "1") -> None:
        short = ["SOLVER.MAX_ITER", steps, "SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
        few = ["INPUT.MIN_SIZE_TEST", "64", "TEST.DETECTIONS_PER_IMAGE", "3", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"]
        monkeypatch.setattr(sys, "argv", ["panoptic.py", *arguments, "--opts", *short, *few])
        tool.main()

    return call


def rows(folder):
    """Names and cells of the rows of the table."""
    lines = (folder / "table.md").read_text().splitlines()[2:]
    return {name.strip(): cells for name, *cells in (line.strip("|").split("|") for line in lines)}


@pytest.mark.slow
def test_it_compares_three_encoders_and_draws_them(run, tmp_path, capsys):
    out = tmp_path / "out"
    run("--student", str(WEIGHTS), "--output", str(out))
    assert list(rows(out)) == ["untrained encoder", "pre-trained", "SPAR student"]
    assert (out / "table.md").read_text().strip() in capsys.readouterr().out
    # One of these is the other here.
    assert rows(out)["pre-trained"] == rows(out)["SPAR student"]
    with Image.open(out / "panoptic.png") as picture:
        assert min(picture.size) > 500
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    run("--student", str(WEIGHTS), "--output", str(out))
    assert finished == {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    with pytest.raises(SystemExit):
        run("--student", str(WEIGHTS), "--output", str(out), steps="2")
    assert "has a finished training with other keys" in capsys.readouterr().err


@pytest.mark.slow
def test_it_compares_two_models_with_two_seeds_and_at_other_sizes(run, tmp_path, monkeypatch):
    configs = [str(ROOT / "configs/toy" / name) for name in ("panoptic.yaml", "mask_transformer.yaml")]
    run("--config-file", *configs, "--encoders", "pre-trained", "--seeds", "2", "--output", str(tmp_path / "out"))
    found = rows(tmp_path / "out")
    assert list(found) == ["PanopticFPN, pre-trained", "MaskTransformer, pre-trained"]
    assert all("±" in cell for cells in found.values() for cell in cells)
    scores = [json.loads(path.read_text())["scores"] for path in (tmp_path / "out").rglob("scores.json")]
    assert len(scores) == 4 and all(0 <= values["PQ"] <= 100 for values in scores)
    runs = [str(next((tmp_path / "out").rglob(f"{name}/pre-trained_0"))) for name in ("panoptic", "mask_transformer")]
    sizes = ["--factors", "0.5", "2", "--scenes", "1", "--output", str(tmp_path / "sizes")]
    monkeypatch.setattr(sys, "argv", ["panoptic_sizes.py", *runs, *sizes])
    load_tool("toy/panoptic_sizes").main()
    lines = (tmp_path / "sizes" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 4 + 6 and all(line.count("|") == 6 for line in lines)


def test_without_a_student(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--student", str(tmp_path / "none.safetensors"), "--output", str(tmp_path / "out"))
    assert "tools/run_demo.py" in capsys.readouterr().err


@pytest.mark.slow
def test_seen_and_unseen_classes(run, tmp_path, monkeypatch):
    out, short = (
        tmp_path / "out",
        ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"],
    )
    options = ["--student", str(WEIGHTS), "--seeds", "1", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["open_vocabulary.py", *options, *short, "INPUT.MIN_SIZE_TEST", "64"])
    load_tool("toy/open_vocabulary").main()
    found = rows(out)
    modes = ["single pass", "random classes", "single pass", "sliding window"]
    assert list(found) == [f"{name}, {mode}" for name, mode in zip(("pre-trained",) * 2 + ("student",) * 2, modes)]
    # Both encoders are the same here.
    assert found["pre-trained, single pass"] == found["student, single pass"]
