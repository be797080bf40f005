"""Error messages for official files that are missing, corrupt or of another data set."""

import dataclasses
import logging
import shutil
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from label_trees import CASES, SIZES, tree, use_trees
from spar_d2.data.datasets.catalog import BENCHMARKS, LABELED_SETS
from spar_d2.data.datasets.semantic import found, missing
from spar_d2.data.preparation import MissingArchive, prepare, survey
from spar_d2.data.preparation.common import label_table, relabel
from spar_d2.data.preparation.registry import PREPARATIONS


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder of all data sets, each of which has three images."""
    use_trees(tmp_path, monkeypatch)
    return tmp_path


def first_file(name, root):
    """The official label file of the first image."""
    preparation = PREPARATIONS[name]
    return preparation.labels(root).file(next(iter(preparation.images(root))))


@pytest.mark.parametrize("name", LABELED_SETS)
def test_missing_archives_are_named(name, root):
    with pytest.raises(MissingArchive, match=r"download \S+ .*from \S+\.\S+ and unpack it in "):
        prepare(name)
    tree(name, root)
    labels = first_file(name, root).parent
    labels = labels.parent if name.startswith("cityscapes") else labels
    shutil.rmtree(labels)
    state = survey(name)
    assert (state.images, state.prepared, len(state.missing)) == (3, 0, 1)
    with pytest.raises(FileNotFoundError, match=state.missing[0]):
        prepare(name)
    with pytest.raises(FileNotFoundError, match=rf"{state.missing[0]}.*then run spar-d2 prepare {name}"):
        DatasetCatalog.get(name)


def test_missing_names_of_the_459_classes_are_an_error(root):
    tree("context60", root, "459")
    (root / "pascal_context/labels.txt").unlink()
    with pytest.raises(MissingArchive, match=r"labels\.txt does not exist: download .* and put it in .*pascal_context"):
        prepare("context60")


@pytest.mark.parametrize(
    ("line", "message"), [("60 person", 'must be like "397: table"'), ("460: person", "up to 459"), ("", "person")]
)
def test_damaged_list_of_classes(root, line, message):
    tree("context60", root, "459")
    path = root / "pascal_context/labels.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line if old.endswith(": person") else old for old in lines))
    with pytest.raises(ValueError, match=rf"labels\.txt .*{message}"):
        prepare("context60")


def test_matlab_files_without_scipy(root, monkeypatch):
    tree("context60", root, "459")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert survey("context60").advice == "prepare"
    with pytest.raises(RuntimeError, match="pip install scipy"):
        prepare("context60")


@pytest.mark.parametrize("name", LABELED_SETS)
def test_missing_labels(name, root, caplog):
    tree(name, root)
    label = first_file(name, root)
    label.unlink()
    with pytest.raises(ValueError, match=rf"has 3 .* 2 with labels were found .*{label.name}; --partial"):
        prepare(name)
    assert not list((root / "spar_labels").rglob("*.png"))
    done = prepare(name, partial=True)
    assert (done.images, done.written) == (2, 2)
    with caplog.at_level(logging.WARNING):
        assert len(DatasetCatalog.get(name)) == 2
    part = "training" if name.endswith("_train") else "validation"
    assert f"{name}: only 2 of 3 {part} images are available and prepared" in caplog.text
    assert found(name) == (2, 3)
    assert missing(name).startswith(f"{name}: 2 of 3 {part} images are prepared; run spar-d2 prepare")


@pytest.mark.parametrize("name", LABELED_SETS)
def test_missing_images(name, root):
    tree(name, root)
    image = list(PREPARATIONS[name].images(root).values())[1]
    image.unlink()
    assert survey(name).advice == "find 1 missing images, prepare"
    with pytest.raises(ValueError, match=rf"2 with labels were found .*{image.name}; --partial"):
        prepare(name)
    assert prepare(name, partial=True).images == 2
    assert survey(name).advice == "find 1 missing images"


@pytest.mark.parametrize("partial", [False, True])
def test_no_images_at_all(partial, root):
    tree("ade20k", root)
    for path in (root / "ADEChallengeData2016").rglob("*.*"):
        path.unlink()
    with pytest.raises(ValueError, match="ade20k has 3 validation images, but 0 with labels were found in [^;]*$"):
        prepare("ade20k", partial=partial)


def test_more_images_than_the_data_set_has(root, monkeypatch, caplog):
    tree("ade20k", root)
    monkeypatch.setitem(BENCHMARKS, "ade20k", dataclasses.replace(BENCHMARKS["ade20k"], images=2))
    with caplog.at_level(logging.WARNING):
        assert prepare("ade20k").images == 3
    assert "ade20k has 2 validation images, but 3 were found" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), CASES)
def test_damaged_labels_are_named(name, form, root):
    tree(name, root, form)
    path = first_file(name, root)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
        prepare(name)
    assert not list(root.rglob("*.tmp.png"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), CASES)
def test_values_out_of_range_are_named(name, form, root):
    tree(name, root, form)
    path = first_file(name, root)
    wrong = 500 if form == "459" else 200
    if path.suffix == ".mat":
        from scipy.io import savemat

        savemat(path, {"LabelMap": np.full(SIZES[0], wrong, dtype=np.uint16)})
    elif form == "colors":
        Image.new("RGB", SIZES[0][::-1], (1, 2, 3)).save(path)
        wrong = "(1, 2, 3)"
    else:
        Image.new("L", SIZES[0][::-1], wrong).save(path)
    with pytest.raises(ValueError, match=path.name) as error:
        prepare(name)
    assert str(wrong) in str(error.value)


def test_a_color_of_voc_that_is_no_class(root):
    tree("voc20", root, "colors")
    path = first_file("voc20", root)
    Image.new("RGB", SIZES[0][::-1], (128, 64, 128)).save(path)
    with pytest.raises(ValueError, match=rf"{path.name} has values that are no labels of this data set: 21"):
        prepare("voc20")


@pytest.mark.parametrize("name", LABELED_SETS)
def test_labels_of_another_size_are_named(name, root):
    tree(name, root)
    path = first_file(name, root)
    Image.new("L", (5, 4)).save(path)
    with pytest.raises(ValueError, match=rf"{path.name} and its image .* differ in size: 5x4 and 53x37 pixels"):
        prepare(name)


def test_labels_of_another_kind_are_named(root):
    tree("ade20k", root)
    path = first_file("ade20k", root)
    Image.new("RGB", SIZES[0][::-1]).save(path)
    with pytest.raises(ValueError, match=rf"{path.name} must be gray or have a palette, its mode is RGB"):
        prepare("ade20k")


def test_a_damaged_image_is_named(root):
    tree("ade20k", root)
    path = root / "ADEChallengeData2016/images/validation/ADE_val_00000002.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read"):
        prepare("ade20k")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"name": "voc"}, "must be one of voc21, .*got 'voc'"), ({"name": "voc21", "workers": 0}, "workers must be")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(**arguments)


def test_relabel_is_a_table():
    table = label_table({0: 255, 3: 1}, 5)
    assert relabel(np.array([[0, 3]], dtype=np.uint16), table).tolist() == [[255, 1]]
    for wrong in (-1, 1, 5, 1000):
        with pytest.raises(ValueError, match=f"no labels of this data set: {wrong}$"):
            relabel(np.array([[wrong, 3]]), table)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["../../outside", "/tmp/outside", "a/../../../outside", "..\\\\..\\\\outside"])
def test_names_that_lead_out_of_the_folder_are_refused(root, wrong):
    tree("voc21", root)
    (names,) = root.rglob("ImageSets/Segmentation/val.txt")
    names.write_text(f"{names.read_text()}\n{wrong}\n")
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(ValueError, match="voc21: the image name .* leads out of its folder"):
        prepare("voc21")
    assert sorted(root.parent.rglob("*")) == before
