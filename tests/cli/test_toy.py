"""The demo from end to end, with fewer scenes and steps."""

import sys
from importlib import import_module

import pytest
from PIL import Image

from reference import ROOT
from spar_d2.data.datasets.scenes import SCENE_SPLITS


@pytest.fixture
def run_demo(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setitem(SCENE_SPLITS, "train", (101, 10))
    monkeypatch.setitem(SCENE_SPLITS, "val", (303, 2))
    toy = import_module("spar_d2.cli.toy")
    monkeypatch.setattr(toy, "SHOWN_SCENES", (0, 1))
    return toy


@pytest.mark.slow
def test_table_pictures_and_student(run_demo, monkeypatch, tmp_path, capsys):
    config = tmp_path / "short.yaml"
    short = "SOLVER:\n  MAX_ITER: 25\nSPAR:\n  TEACHER:\n    STRIDE: 24\n"
    config.write_text(f"_BASE_: {ROOT}/configs/toy/distill.yaml\n{short}")
    output = tmp_path / "output"
    monkeypatch.setattr(sys, "argv", ["toy", "--config-file", str(config), "--output", str(output)])
    run_demo.main()
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out
    scores = [float(line.split("|")[2]) for line in table.splitlines()[2:]]
    single_pass, tiles, teacher, student = scores
    assert student > single_pass + 5
    assert teacher > single_pass + 5
    assert tiles > single_pass
    assert (output / "student.safetensors").is_file()
    assert "Starting training" in (output / "log.txt").read_text(), "what the console leaves out"
    for name in ("predictions.png", "features.png"):
        with Image.open(output / "pictures" / name) as picture:
            assert min(picture.size) > 400


def test_a_wrong_config_file_is_one_line(run_demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", "--config-file", "none.yaml"])
    with pytest.raises(SystemExit):
        run_demo.main()
    assert capsys.readouterr().err.startswith("error: --config-file: there is no file none.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [["MODEL.SPAR.TRAINABLE", "blk_99"], ["SOLVER.IMS_PER_BATCH", "0"], ["MODEL.SPAR.ENCODER", "none"]]
)
def test_a_failed_start_keeps_an_earlier_student(run_demo, monkeypatch, tmp_path, capsys, wrong):
    student = tmp_path / "output" / "student.safetensors"
    student.parent.mkdir()
    student.write_bytes(b"earlier")
    (student.parent / "config.yaml").write_text("earlier")
    monkeypatch.setattr(sys, "argv", ["toy", "--output", str(student.parent), *wrong])
    with pytest.raises(SystemExit):
        run_demo.main()
    assert student.read_bytes() == b"earlier"
    assert (student.parent / "config.yaml").read_text() == "earlier"
    assert "Distilling" not in capsys.readouterr().out
