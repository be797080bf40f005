"""`spar-d2 check-data`: counts, and what would stop a training."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from own_sets import labels, panoptic_set, semantic_set
from spar_d2.cli.__main__ import main
from spar_d2.utils.id_maps import as_colors


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """Runs the command; returns the exit code, and the printed lines without repeated spaces."""
    monkeypatch.chdir(tmp_path)

    def run(file, *arguments):
        code = main(["check-data", str(file), "--output", str(tmp_path / "drawn"), *arguments])
        return code, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("kind", [semantic_set, panoptic_set])
def test_a_good_set_is_counted_and_drawn(check, tmp_path, kind):
    code, lines = check(kind(tmp_path), "--pictures", "4")
    assert code == 0
    assert "train 4 4 64x48 0" in lines and "val 2 2 64x48 0" in lines
    assert any(line.startswith("No problems. Data sets: b") for line in lines)
    boat = next(line for line in lines if line.startswith("boat"))
    assert boat == ("boat 10.42% 4 10.42% 2" if kind is semantic_set else "boat 10.42% 4 4 10.42% 2 2")
    pictures = sorted((tmp_path / "drawn").iterdir())
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.width >= 64 and picture.height > 48
        # Pixels of the three classes have different colors.
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels[5, 5] - pixels[45, 60]).sum() > 60


def test_splits_can_be_chosen_and_may_have_no_labels(check, tmp_path):
    file = semantic_set(tmp_path, splits={"all": {"images": "images"}, "train": {"images": "images/train"}})
    code, lines = check(file, "--splits", "all")
    assert code == 0 and "all 6 - 64x48 0" in lines and not (tmp_path / "drawn").exists()
    with pytest.raises(SystemExit):
        check(file, "--splits", "test")


def break_semantic(folder):
    Image.fromarray(labels(0)[:20]).save(folder / "labels/train/0_gt.png")
    (folder / "labels/train/1_gt.png").write_text("no image")
    (folder / "labels/train/2_gt.png").unlink()
    Image.fromarray(np.full((48, 64), 9, dtype=np.uint8)).save(folder / "labels/train/3_gt.png")
    (folder / "images/val/0.jpg").write_bytes((folder / "images/val/0.jpg").read_bytes()[:300])
    Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8)).save(folder / "labels/val/1_gt.png")


def test_every_problem_is_named(check, tmp_path):
    file = semantic_set(tmp_path)
    break_semantic(tmp_path)
    code, lines = check(file)
    text = "\n".join(lines)
    assert code == 1 and "6 problems would stop a training." in lines
    for part in (
        "problem: train: 1 of 4 images have no label map, such as .*2.jpg",
        "0_gt.png has 64x20 pixels, but its image .*0.jpg has 64x48",
        "train: label map: .*1_gt.png cannot be read",
        "train: pixel values that are neither a class nor ignored: 9 in 3072 pixels",
        "val: image: .*val/0.jpg cannot be read",
        "val: label map: .*1_gt.png must have one number per pixel",
    ):
        assert any(re.search(part, line) for line in lines), (part, text)


def test_problems_of_panoptic_masks_are_named(check, tmp_path):
    file = panoptic_set(tmp_path)
    (tmp_path / "panoptic_train/0.png").unlink()
    Image.fromarray(as_colors(np.full((48, 64), 8))).save(tmp_path / "panoptic_train/1.png")
    Image.fromarray(np.zeros((48, 64), dtype=np.uint8)).save(tmp_path / "panoptic_train/2.png")
    Image.fromarray(as_colors(np.ones((40, 64), dtype=int))).save(tmp_path / "panoptic_train/3.png")
    code, lines = check(file)
    assert code == 1 and "4 problems would stop a training." in lines
    problems = [line for line in lines if line.startswith("problem: train: ")]
    assert any("1 of 4 annotations are incomplete: the mask 0.png is not in" in line for line in problems)
    assert any("segments that the JSON file does not list: 8 in 3072 pixels" in line for line in problems)
    assert any("2.png must be RGB" in line for line in problems)
    assert any("3.png has 64x40 pixels, but its image" in line for line in problems)


def test_images_in_two_splits_and_labels_without_image_are_noted(check, tmp_path):
    split = {"images": "images/train", "labels": "labels/train"}
    file = semantic_set(tmp_path, splits={"train": split, "val": split})
    (tmp_path / "images/train/3.jpg").unlink()
    code, lines = check(file)
    assert code == 0
    assert any(line.startswith("note: train and val share 3 images") for line in lines)
    assert any(line.startswith("note: train: 1 label maps have no image, such as") for line in lines)


def test_labels_that_are_all_ignored_are_a_problem(check, tmp_path):
    file = semantic_set(tmp_path)
    for path in (tmp_path / "labels/train").iterdir():
        Image.fromarray(np.zeros((48, 64), dtype=np.uint8)).save(path)
    code, lines = check(file)
    assert code == 1 and any("train: all pixels of the labels are ignored" in line for line in lines)


def test_things_that_are_stuff_in_another_split_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = panoptic_set(tmp_path)
    text = (tmp_path / "panoptic_train.json").read_text()
    (tmp_path / "panoptic_train.json").write_text(
        text.replace('"name": "sea", "isthing": 0', '"name": "sea", "isthing": 1')
    )
    with pytest.raises(SystemExit):
        main(["check-data", str(file)])
    assert "(isthing)" in capsys.readouterr().err


def change_json(folder, change, split="train"):
    path = folder / f"panoptic_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_segments_listed_twice_and_wrong_areas_are_told(check, tmp_path):
    def change(content):
        first, second = (annotation["segments_info"] for annotation in content["annotations"][:2])
        first.append(first[0])
        second[0]["area"] = 7

    file = panoptic_set(tmp_path)
    change_json(tmp_path, change)
    code, lines = check(file)
    assert code == 1 and "1 problems would stop a training." in lines
    assert any("lists a segment id more than once for" in line and "0.jpg" in line for line in lines)
    note = next(line for line in lines if line.startswith("note: train: 1 segments have an area"))
    assert "(area 7, " in note


def test_categories_in_another_order_are_the_same(check, tmp_path):
    file = panoptic_set(tmp_path)
    change_json(tmp_path, lambda content: content["categories"].reverse(), "val")
    code, lines = check(file)
    assert code == 0 and "boat 10.42% 4 4 10.42% 2 2" in lines


def test_a_taken_name_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["check-data", str(semantic_set(tmp_path, name="coco_2017"))])
    assert "name: the data set 'coco_2017_train' is already registered" in capsys.readouterr().err
