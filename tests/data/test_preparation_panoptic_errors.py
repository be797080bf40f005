"""Missing, corrupt and wrong official files of panoptic labels; interrupted and resumed preparation."""

import json
import re
import shutil
import socket
import time

import numpy as np
import pytest
from PIL import Image

from label_trees import PANOPTIC, SIZES, official_files, tree, use_trees
from spar_d2.data.preparation import MissingArchive, prepare, survey, writing
from spar_d2.data.preparation.registry import PREPARATIONS

# test_preparation.py and test_preparation_errors.py have quick tests of the same code.
pytestmark = pytest.mark.slow
SITES = {"c": "www.cityscapes-dataset.com", "a": "sceneparsing.csail.mit.edu"}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder of all data sets, each of which has three images."""
    use_trees(tmp_path, monkeypatch)
    return tmp_path


def official(name, root):
    """Paths of the official files of each image."""
    return list(official_files(name, root).values())


@pytest.mark.parametrize("name", PANOPTIC)
def test_missing_archives_are_named(name, root):
    with pytest.raises(MissingArchive, match=r"download \S+ from \S+\.\S+ and unpack it in "):
        prepare(name)
    tree(PANOPTIC[name], root)
    folder = root / ("cityscapes/gtFine" if name[0] == "c" else "ADEChallengeData2016/annotations_instance")
    shutil.rmtree(folder)
    archive = "gtFine_trainvaltest.zip" if name[0] == "c" else "annotations_instance.tar"
    assert (survey(name).missing, survey(name).images) == ((archive,), 3)
    with pytest.raises(MissingArchive, match=rf"download {archive} from {SITES[name[0]]}\S* and unpack it in {root}"):
        prepare(name)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", PANOPTIC)
def test_missing_and_damaged_labels(name, number, root):
    tree(PANOPTIC[name], root)
    path = official(name, root)[1][number if name[0] == "a" else 0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        prepare(name)
    path.unlink()
    part = "training" if name.endswith("_train") else "validation"
    with pytest.raises(
        ValueError, match=rf"{name} has 3 {part} images, but 2 with labels were found .*{path.name}; --partial"
    ):
        prepare(name)
    prepare(name, partial=True)
    assert len(json.loads(PREPARATIONS[name].index(root).read_text())["annotations"]) == 2


@pytest.mark.parametrize(
    ("name", "number"), [("cityscapes_panoptic_val", 0), ("ade20k_panoptic_val", 0), ("ade20k_panoptic_val", 1)]
)
def test_sizes_that_differ(name, number, root):
    tree(PANOPTIC[name], root)
    files = official(name, root)[0]
    Image.new("RGB" if number else "L", (5, 4)).save(files[number])
    shown = "53x37 and 5x4" if number else "5x4 and 53x37"
    with pytest.raises(ValueError, match=rf"{files[0]} and .* differ in size: {shown} pixels"):
        prepare(name)


@pytest.mark.parametrize("value", [34, 255, 999, 34000, 65535])
def test_values_of_cityscapes_that_are_no_labels(value, root):
    tree("cityscapes", root)
    (path,) = official("cityscapes_panoptic_val", root)[0]
    values = np.full(SIZES[0], 7, dtype=np.uint16)
    values[3, 4] = value
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=rf"{path} has values that are no labels of this data set: {value}$"):
        prepare("cityscapes_panoptic_val")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({(3, 4): (0, 7)}, "has an instance of class 0, must be in 1..100"),
        ({(3, 4): (101, 7)}, "has an instance of class 101, must be in 1..100"),
        ({(3, 4): (2, 7), (5, 6): (9, 7)}, "has several classes for the instance 7: 2, 9"),
    ],
)
def test_instances_of_ade20k_that_cannot_be(changes, message, root):
    tree("ade20k", root)
    _, path = official("ade20k_panoptic_val", root)[0]
    values = np.zeros((*SIZES[0], 3), dtype=np.uint8)
    for place, color in changes.items():
        values[place] = (*color, 0)
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=f"{path} {message}"):
        prepare("ade20k_panoptic_val")


def test_values_and_kinds_of_ade20k(root):
    tree("ade20k", root)
    semantic, instances = official("ade20k_panoptic_val", root)[0]
    Image.new("L", SIZES[0][::-1]).save(instances)
    with pytest.raises(ValueError, match=rf"{instances} must be RGB \(.*\), its mode is L"):
        prepare("ade20k_panoptic_val")
    Image.new("L", SIZES[0][::-1], 151).save(semantic)
    with pytest.raises(ValueError, match=f"{semantic} has values that are no labels of this data set: 151"):
        prepare("ade20k_panoptic_val")


@pytest.mark.parametrize("name", PANOPTIC)
def test_missing_files_are_written_again(name, root):
    tree(PANOPTIC[name], root)
    prepare(name)
    preparation = PREPARATIONS[name]
    first = preparation.prepared(root, next(iter(preparation.images(root))))
    before = {path: path.read_bytes() for path in [*preparation.folder(root).iterdir(), preparation.index(root)]}
    times = {path: path.stat().st_mtime_ns for path in before}
    assert prepare(name).written == 0
    assert {path: path.stat().st_mtime_ns for path in before} == times
    for lost, written in ((preparation.index(root), 0), (first, 1)):
        lost.unlink()
        assert survey(name).advice == "prepare"
        assert (prepare(name).written, survey(name).advice) == (written, "")
        assert {path: path.read_bytes() for path in before} == before
    kept = [path for path in before if path not in (first, preparation.index(root))]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)


@pytest.mark.parametrize("name", PANOPTIC)
def test_official_labels_may_be_deleted_after_preparation(name, root):
    tree(PANOPTIC[name], root)
    prepare(name)
    folder = PREPARATIONS[name].official.place.find(root)
    shutil.rmtree(folder)
    assert (survey(name).advice, prepare(name).written) == ("", 0)
    PREPARATIONS[name].index(root).unlink()
    assert survey(name).advice.startswith("download ")
    with pytest.raises(MissingArchive, match=f"{folder}.* does not exist"):
        prepare(name)


def assert_as_if_never_stopped(name, root):
    """All files are those of an undisturbed run."""
    tree(PANOPTIC[name], root / "other")
    prepare(name, root / "other")
    preparation = PREPARATIONS[name]
    names = [path.name for path in preparation.folder(root).iterdir()]
    assert sorted(names) == sorted(path.name for path in preparation.folder(root / "other").iterdir())
    for path in [*(preparation.folder(root) / name for name in names), preparation.index(root)]:
        assert path.read_bytes() == (root / "other" / path.relative_to(root)).read_bytes()


def test_an_interrupted_preparation_resumes_and_writes_the_index_last(root, monkeypatch):
    name = "cityscapes_panoptic_val"
    tree("cityscapes", root)
    preparation = PREPARATIONS[name]
    image = list(preparation.images(root).values())[2]
    away = image.rename(root / "away.png")
    prepare(name, partial=True)
    assert len(json.loads(preparation.index(root).read_text())["images"]) == 2
    next(preparation.folder(root).iterdir()).unlink()
    away.rename(image)
    write, finished = writing._write, writing.as_completed

    def write_slowly(task, labels):
        entry = write(task, labels)
        time.sleep(0.2)
        return entry

    def interrupt(futures):
        yield next(finished(futures))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "_write", write_slowly)
        patch.setattr(writing, "as_completed", interrupt)
        prepare(name, workers=1)
    # The old one, which does not know of the third image, is gone.
    assert not preparation.index(root).exists()
    assert not list(root.rglob("*.tmp.*"))
    assert survey(name).advice == "prepare"
    prepare(name)
    assert_as_if_never_stopped(name, root)


def test_an_error_leaves_no_index(root):
    tree("ade20k", root)
    paths = official("ade20k_panoptic_val", root)
    whole = paths[2][1].read_bytes()
    paths[2][1].write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{paths[2][1]} cannot be read"):
        prepare("ade20k_panoptic_val", workers=1)
    assert not PREPARATIONS["ade20k_panoptic_val"].index(root).exists()
    paths[2][1].write_bytes(whole)
    assert prepare("ade20k_panoptic_val").written == 1
    assert_as_if_never_stopped("ade20k_panoptic_val", root)


@pytest.mark.parametrize("name", PANOPTIC)
def test_leftovers_of_a_killed_run_are_removed(name, root):
    tree(PANOPTIC[name], root)
    preparation = PREPARATIONS[name]
    # Of a process that cannot be: numbers of processes are smaller.
    owner = f"{re.sub(r'[^A-Za-z0-9_]', '_', socket.gethostname())}-{2**30}-0123abcd"
    left = preparation.folder(root) / f".x.{owner}.tmp.png", preparation.index(root).with_name(f".y.{owner}.tmp.json")
    for folder in left:
        folder.mkdir(parents=True)
        (folder / f".content{folder.suffix}").write_bytes(b"half")
    prepare(name)
    assert not list(root.rglob("*.tmp.*"))
