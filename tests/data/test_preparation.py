"""Conversion of official label files, in all their forms, to those of an evaluation."""

import re
import shutil
import socket
import time

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image

from label_trees import CASES, IGNORED, SIZES, tree, use_trees
from spar_d2.data.datasets.catalog import LABELED_SETS
from spar_d2.data.datasets.semantic import found, missing
from spar_d2.data.preparation import prepare, survey, writing
from spar_d2.data.preparation.registry import PREPARATIONS


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder of all data sets, each of which has three images."""
    use_trees(tmp_path, monkeypatch)
    return tmp_path


def read(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_pixel_of_every_form(name, form, root):
    expected = tree(name, root, form)
    assert survey(name).advice == "prepare"
    done = prepare(name)
    assert (done.images, done.written) == (3, 3)
    records = DatasetCatalog.get(name)
    assert [record["image_id"] for record in records] == list(expected)
    for record, (height, width) in zip(records, SIZES):
        labels = read(record["sem_seg_file_name"])
        assert labels.shape == (height, width)
        assert np.array_equal(labels, expected[record["image_id"]])
        with Image.open(record["file_name"]) as image:
            assert image.size == (width, height)
    assert (survey(name).advice, missing(name), found(name)) == ("", "", (3, 3))


@pytest.mark.parametrize("name", LABELED_SETS)
def test_trees_have_every_class_and_ignored_pixels(name, root):
    values = np.unique(np.concatenate([labels.ravel() for labels in tree(name, root).values()]))
    classes = list(range(len(LABELED_SETS[name].classes)))
    assert values.tolist() == classes + [IGNORED] * (name != "context60")


@pytest.mark.parametrize("name", LABELED_SETS)
def test_tables_contain_only_classes(name, root):
    tree(name, root)
    table = PREPARATIONS[name].labels(root).table
    assert set(table.tolist()) - {254, IGNORED} == set(range(len(LABELED_SETS[name].classes)))


def test_all_in_one_folder(root):
    expected = {name: tree(name, root) for name in LABELED_SETS}
    for name in LABELED_SETS:
        prepare(name)
    for name in LABELED_SETS:
        for record in DatasetCatalog.get(name):
            assert np.array_equal(read(record["sem_seg_file_name"]), expected[name][record["image_id"]])


@pytest.mark.parametrize(("name", "part"), [("ade20k", "validation"), ("ade20k_train", "training")])
def test_records_of_ade20k_are_those_of_detectron2(name, part, root):
    from detectron2.data.datasets import load_sem_seg

    tree(name, root)
    prepare(name)
    folder = root / "ADEChallengeData2016"
    theirs = load_sem_seg(folder / f"annotations_detectron2/{part}", folder / f"images/{part}")
    ours = DatasetCatalog.get(name)
    assert [{key: record[key] for key in ("file_name", "sem_seg_file_name")} for record in ours] == theirs


def test_detectron2_reads_the_records(root):
    expected = tree("voc21", root)
    prepare("voc21")
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    for record in DatasetCatalog.get("voc21"):
        mapped = mapper(record)
        assert np.array_equal(mapped["sem_seg"].numpy(), expected[record["image_id"]])
        assert (mapped["height"], mapped["width"]) == expected[record["image_id"]].shape


@pytest.mark.parametrize("name", LABELED_SETS)
def test_a_second_run_writes_no_files(name, root, monkeypatch):
    tree(name, root)
    prepare(name)
    labels = list(PREPARATIONS[name].folder(root).rglob("*.png"))
    before = {path: path.stat().st_mtime_ns for path in labels}
    assert prepare(name).written == 0
    first = DatasetCatalog.get(name)[0]["sem_seg_file_name"]
    assert {path: path.stat().st_mtime_ns for path in labels} == before
    content = read(first)
    (root / first).unlink()
    done = prepare(name)
    assert (done.images, done.written) == (3, 1)
    assert np.array_equal(read(first), content)
    assert sum(path.stat().st_mtime_ns != before[path] for path in labels) == 1


@pytest.mark.parametrize("name", LABELED_SETS)
def test_leftovers_of_a_killed_run_are_removed(name, root):
    tree(name, root)
    folder = PREPARATIONS[name].folder(root)
    # Of a process that cannot be: numbers of processes are smaller.
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())
    left = folder / f".x.{host}-{2**30}-0123abcd.tmp.png"
    left.mkdir(parents=True)
    (left / ".content.png").write_bytes(b"half")
    prepare(name)
    assert not list(root.rglob("*.tmp.png"))


def test_official_labels_may_be_deleted_after_preparation(root):
    tree("context59", root, "459")
    prepare("context59")
    shutil.rmtree(root / "pascal_context")
    assert survey("context59").advice == ""
    assert prepare("context59").written == 0
    assert len(DatasetCatalog.get("context59")) == 3
    assert survey("context60").missing == ("59_context_labels.tar.gz",)


def test_labels_of_the_cityscapes_scripts_are_used(root):
    tree("cityscapes", root)
    prepare("cityscapes")
    for path in (root / "cityscapes/gtFine").rglob("*_labelIds.png"):
        path.unlink()
    assert prepare("cityscapes").written == 0


def test_training_labels_of_cityscapes_are_where_detectron2_looks_for_them(root):
    tree("cityscapes_train", root)
    prepare("cityscapes_train")
    folder = root / "cityscapes/gtFine/train"
    names = ["aachen/aachen_000000_000294", "aachen/aachen_000000_000576", "zurich/zurich_000000_000019"]
    assert sorted(folder.rglob("*_labelTrainIds.png")) == [
        folder / f"{name}_gtFine_labelTrainIds.png" for name in names
    ]


def test_a_list_of_segmentation_images_comes_first(root):
    tree("context59", root)
    folder = root / "VOCdevkit/VOC2010/ImageSets"
    (folder / "SegmentationContext").mkdir()
    (folder / "SegmentationContext/val.txt").write_text("2010_006079\n\n2008_000002\n")
    prepare("context59", partial=True)
    assert [record["image_id"] for record in DatasetCatalog.get("context59")] == ["2010_006079", "2008_000002"]


def test_only_complete_files_remain_after_ctrl_c(root, monkeypatch):
    tree("voc21", root)
    write, finished = writing._write, writing.as_completed

    def write_slowly(task, labels):
        write(task, labels)
        time.sleep(0.3)

    def interrupt(futures):
        yield next(finished(futures))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "_write", write_slowly)
        patch.setattr(writing, "as_completed", interrupt)
        prepare("voc21", workers=1)
    written = [path for path in (root / "spar_labels").rglob("*") if path.is_file()]
    assert 1 <= len(written) < 3
    assert not any("tmp" in path.name for path in written)
    assert prepare("voc21").written == 3 - len(written)
