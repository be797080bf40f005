"""The whole way from official files to label files that Detectron2 reads, on the command line."""

from importlib import import_module

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from label_trees import make_tree, use_trees
from spar_d2.data.datasets.catalog import LABELED_SETS
from spar_d2.data.preparation.registry import GROUPS, PREPARATIONS


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder of all data sets, each of which has three images."""
    use_trees(tmp_path, monkeypatch)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    import_module("spar_d2.cli.prepare").main()


def tree(name, root):
    return make_tree(name, root, np.random.default_rng(1))


@pytest.mark.parametrize("name", LABELED_SETS)
def test_prepares(name, root, monkeypatch, capsys):
    expected = tree(name, root)
    run(monkeypatch, name)
    assert f"{name}: 3 labels written, 0 already existed" in capsys.readouterr().out
    records = DatasetCatalog.get(name)
    assert len(records) == 3
    for record in records:
        with Image.open(record["sem_seg_file_name"]) as labels:
            assert np.array_equal(np.asarray(labels), expected[record["image_id"]])
    run(monkeypatch, name, "--workers", 1)
    assert f"{name}: 0 labels written, 3 already existed" in capsys.readouterr().out


def test_another_root(root, monkeypatch):
    tree("voc20", root / "elsewhere")
    run(monkeypatch, "voc20", "--root", root / "elsewhere")
    assert len(list((root / "elsewhere/spar_labels/voc20").glob("*.png"))) == 3
    assert not (root / "spar_labels").exists()


def test_all_available_archives_are_prepared(root, monkeypatch, capsys):
    tree("voc21", root)
    tree("ade20k", root)
    tree("cityscapes_train", root)
    run(monkeypatch, "all", "voc21")
    output = capsys.readouterr().out
    for name in PREPARATIONS:
        there = name in (
            "voc21",
            "voc20",
            "ade20k",
            "ade20k_panoptic_val",
            "cityscapes_train",
            "cityscapes_panoptic_train",
        )
        assert (f"{name}: 3 labels written" in output) == there
        assert (f"{name}: skipped, download" in output) != there


def test_the_table(root, monkeypatch, capsys):
    tree("voc21", root)
    tree("cityscapes", root)
    run(monkeypatch, "voc21")
    capsys.readouterr()
    next((root / "cityscapes/leftImg8bit").rglob("*.png")).unlink()
    run(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"In {root}:"
    assert [line.split()[0] for line in lines[2:]] == list(PREPARATIONS)
    cells = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[2:]}
    assert cells["voc21"] == "3/3 3 -"
    assert cells["voc20"] == "3/3 0 prepare"
    assert cells["cityscapes"] == "2/3 0 find 1 missing images, prepare"
    assert cells["cityscapes_panoptic_val"] == "2/3 0 find 1 missing images, prepare"
    assert cells["voc21_train"] == "0/3 0 download VOCtrainval_11-May-2012.tar"
    assert cells["ade20k_panoptic_train"] == "0/3 0 download ADEChallengeData2016.zip and annotations_instance.tar"
    assert cells["coco_object"] == "0/3 0 download val2017.zip and stuffthingmaps_trainval2017.zip"


def test_a_part(root, monkeypatch, capsys):
    tree("ade20k", root)
    (root / "ADEChallengeData2016/images/validation/ADE_val_00000002.jpg").unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, "ade20k")
    assert "ADE_val_00000002.jpg; --partial prepares the available ones" in capsys.readouterr().err
    run(monkeypatch, "ade20k", "--partial")
    assert "ade20k: 2 labels written" in capsys.readouterr().out
    assert [record["image_id"][-1] for record in DatasetCatalog.get("ade20k")] == ["1", "3"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_name_for_several(group, root, monkeypatch, capsys):
    base = group.removesuffix("_panoptic")
    tree(base, root)
    run(monkeypatch, group)
    output = capsys.readouterr().out.splitlines()
    prepared = [line.split(":")[0] for line in output if "3 labels written, 0 already existed" in line]
    assert prepared == [name for name in GROUPS[group] if not name.endswith("_train")]
    left_out = [line for line in output if "skipped, download " in line]
    assert [line.split(":")[0] for line in left_out] == [name for name in GROUPS[group] if name.endswith("_train")]
    tree(f"{base}_train", root)
    run(monkeypatch, group, f"{group}_val")
    output = capsys.readouterr().out
    assert all(f"{name}: {3 * name.endswith('_train')} labels written" in output for name in GROUPS[group])
    assert len(output.splitlines()) == len(GROUPS[group])
    for split in ("train", "val"):
        assert len(DatasetCatalog.get(f"spar_{group}_{split}")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cityscapes_panoptic"], "download leftImg8bit_trainvaltest.zip from www.cityscapes-dataset.com/downloads"),
        (["ade20k_panoptic"], "download ADEChallengeData2016.zip"),
        (["voc"], "NAME must be one of voc21, "),
        (["all"], "contains no official files of any data set"),
        (["voc21"], "download VOCtrainval_11-May-2012.tar"),
        (["voc21", "--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_ctrl_c(root, monkeypatch):
    tree("voc21", root)
    tool = import_module("spar_d2.cli.prepare")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "prepare", interrupt)
    monkeypatch.setattr("sys.argv", ["prepare", "voc21"])
    with pytest.raises(SystemExit, match="stopped; run the same command again to continue"):
        tool.main()
