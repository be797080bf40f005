"""Data-set files: what they register, and that every mistake names the file and the key."""

import json
import tarfile

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from own_sets import SIZE, forget, labels, panoptic_set, semantic_set, write
from spar_d2.data.datasets.dataset_file import read_dataset_file
from spar_d2.data.datasets.file_registration import register_dataset_file
from spar_d2.data.mappers import PanopticMapper
from spar_d2.text import Vocabulary
from spar_d2.utils.label_values import read_label_map
from spar_d2.utils.panoptic_numbers import separate_numbers


@pytest.fixture(autouse=True)
def catalogs_as_they_were():
    yield
    forget()


def registered(file, split="train"):
    name = f"{file.stem}_{split}"
    register_dataset_file(file)
    return DatasetCatalog.get(name), MetadataCatalog.get(name)


def test_a_semantic_set_has_classes_in_the_order_of_the_file(tmp_path):
    records, metadata = registered(semantic_set(tmp_path))
    assert len(records) == 4 and metadata.evaluator_type == "sem_seg" and metadata.ignore_label == 255
    assert metadata.stuff_classes == ["sand", "sea", "boat"] and metadata.stuff_colors[1] == [0, 0, 200]
    assert Vocabulary.of(metadata.vocabulary).classes == (("sand",), ("sea", "water"), ("boat",))
    expected = labels(1)
    expected[0] = 255
    assert np.array_equal(read_label_map(records[1]), expected)


def test_synonyms_in_one_string_are_split_at_commas(tmp_path):
    classes = [{"name": "sea", "synonyms": "water, ocean"}, "sand", "boat"]
    parsed = read_dataset_file(semantic_set(tmp_path, classes=classes, ignore=255))
    assert parsed.classes[0].synonyms == ("water", "ocean")


def test_values_that_are_labels_are_not_converted(tmp_path):
    file = semantic_set(tmp_path, classes=["a", "b", "c", "d"], ignore=[255])
    records, _ = registered(file)
    assert "label_values" not in records[0]
    assert np.array_equal(read_label_map(records[0])[1:], labels(0)[1:] + 1)


def test_values_continue_from_the_class_before(tmp_path):
    classes = [{"name": "a", "value": 5}, "b", {"name": "c", "value": 1}, "d"]
    parsed = read_dataset_file(semantic_set(tmp_path, classes=classes, ignore=[0, 255]))
    assert [data_class.value for data_class in parsed.classes] == [5, 6, 1, 2]
    assert dict(parsed.label_values()) == {5: 0, 6: 1, 1: 2, 2: 3, 0: 255, 255: 255}


def test_more_than_255_classes_use_16_bits(tmp_path):
    file = semantic_set(tmp_path, classes=[f"class {number}" for number in range(300)], ignore=[])
    records, metadata = registered(file)
    assert metadata.ignore_label == 65535 and read_label_map(records[0]).max() == 3


def test_a_value_that_is_no_class_is_named_with_its_file(tmp_path):
    file = semantic_set(tmp_path, classes=[{"name": "a", "value": 1}, "b"])
    records, _ = registered(file)
    with pytest.raises(ValueError, match=r"0_gt\.png has the pixel values 3, .*classes"):
        read_label_map(records[0])


def test_images_and_labels_are_matched_by_rules_in_subfolders(tmp_path):
    for city in ("a", "b"):
        for part, name in (("images", "1_photo.png"), ("images", "1_depth.png"), ("labels", "1_ids.png")):
            (tmp_path / part / city).mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels(0)).save(tmp_path / part / city / name)
    rules = {"image_name": "{stem}_photo.png", "label_name": "{stem}_ids.png"}
    splits = {"all": {"images": "images", "labels": "labels"}}
    file = write(tmp_path / "cities.yaml", {"classes": ["x", "y", "z"], "splits": splits, **rules})
    records, _ = registered(file, "all")
    pairs = [(record["file_name"][-13:], record["sem_seg_file_name"][-11:]) for record in records]
    assert pairs == [("a/1_photo.png", "a/1_ids.png"), ("b/1_photo.png", "b/1_ids.png")]


def test_images_come_from_lists_and_tars(tmp_path):
    file = semantic_set(tmp_path)
    (tmp_path / "list.txt").write_text("images/train/2.jpg\nimages/val/0.jpg\n")
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        tar.add(tmp_path / "images/train/0.jpg", "0.jpg")
    content = yaml.safe_load(file.read_text())
    content["splits"] = {
        "listed": {"images": "list.txt", "labels": "labels/train"},
        "unlabeled": {"images": ["more.tar", "images/val"]},
        "tar": {"images": "more.tar", "labels": "labels/train"},
    }
    write(file, content)
    register_dataset_file(file)
    names = [record["sem_seg_file_name"][-10:] for record in DatasetCatalog.get("beach_listed")]
    assert names == ["n/2_gt.png", "n/0_gt.png"]
    unlabeled = DatasetCatalog.get("beach_unlabeled")
    assert len(unlabeled) == 3 and "tar" in unlabeled[0] and "sem_seg_file_name" not in unlabeled[0]
    with pytest.raises(ValueError, match=r"beach\.yaml: splits\.tar\.images: .*unpack it"):
        DatasetCatalog.get("beach_tar")


def test_a_panoptic_set_has_the_categories_of_its_json(tmp_path):
    records, metadata = registered(panoptic_set(tmp_path))
    assert metadata.thing_classes == ["boat"] and metadata.stuff_classes == ["things", "sand", "sea"]
    assert records[0]["file_name"].endswith("train/0.jpg") and records[0]["height"] == SIZE[0]
    numbers = separate_numbers("boats_train", metadata.as_dict())
    assert (numbers.own_things, numbers.own_stuff) == ({0: 30}, {1: 10, 2: 20})
    mapped = PanopticMapper(True, augmentations=[], numbers=numbers)(records[0])
    assert mapped["instances"].gt_classes.tolist() == [0]
    assert mapped["sem_seg"][0, 0] == 1 and mapped["sem_seg"][47, 63] == 2 and mapped["sem_seg"][30, 12] == 0


def test_classes_of_a_panoptic_set_rename_and_color_categories(tmp_path):
    classes = [{"name": "ship", "value": 30, "thing": True, "color": [9, 9, 9]}, "sea", "sand"]
    _, metadata = registered(panoptic_set(tmp_path, classes=classes))
    assert metadata.thing_classes == ["ship"] and metadata.thing_colors == [[9, 9, 9]]
    assert metadata.stuff_classes[1:] == ["sea", "sand"]


def test_a_changed_file_is_registered_again_and_a_taken_name_is_refused(tmp_path):
    file = semantic_set(tmp_path)
    register_dataset_file(file)
    register_dataset_file(file)
    content = yaml.safe_load(file.read_text())
    content["classes"][0]["name"] = "beach"
    write(file, content)
    assert registered(file)[1].stuff_classes[0] == "beach"
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other/beach\.yaml: name: .*'beach_train' is already registered by .*beach"):
        register_dataset_file(semantic_set(tmp_path / "other"))
    with pytest.raises(ValueError, match="name: .*'spar_scenes_train' is already registered"):
        register_dataset_file(write(tmp_path / "c.yaml", {**content, "name": "spar_scenes"}))


TRAIN = {"images": "images/train", "labels": "labels/train"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clases": ["a"]}, "clases: unknown key; did you mean classes"),
        ({"classes": [{"name": "a", "synonym": ["b"]}]}, r"classes\[0\]\.synonym: unknown key; did you mean synonyms"),
        ({"splits": {"train": {**TRAIN, "label": "x"}}}, r"splits\.train\.label: unknown key; did you mean labels"),
        ({"classes": []}, "classes: must be a list of at least one class"),
        ({"classes": None}, "classes: must be a list"),
        ({"classes": ["a", ""]}, r"classes\[1\]\.name: must not be empty"),
        ({"classes": ["a", None]}, r"classes\[1\]\.name: must be a string, got nothing"),
        ({"classes": ["a", False]}, r"classes\[1\]\.name: must be a string, got False; quote it"),
        ({"classes": ["a", "b", "A "]}, r"classes\[2\]\.name: 'A' occurs twice, first in classes\[0\]\.name"),
        ({"classes": ["a", {"name": "b", "synonyms": "a"}]}, r"classes\[1\]\.synonyms: 'a' occurs twice"),
        ({"classes": [{"name": "a", "value": 1}, {"name": "b", "value": 1}]}, r"classes\[1\]\.value: 1 is already"),
        ({"classes": [{"name": "a", "value": 70000}]}, r"classes\[0\]\.value: must be an integer in 0\.\.65535"),
        ({"classes": [{"name": "a", "color": [0, 0, 256]}]}, r"classes\[0\]\.color: must be \[red, green, blue\]"),
        ({"classes": [{"name": "a", "thing": "yes!"}]}, r"classes\[0\]\.thing: must be true or false"),
        ({"ignore": 2}, "ignore: 2 is also the value of a class"),
        ({"ignore": -1}, "ignore: must be pixel values"),
        ({"label_name": "labels.png"}, r"label_name: must have \{stem\} once"),
        ({"image_name": "{stem}_x.jpg"}, r"splits\.train\.images: no image matches image_name"),
        ({"splits": {}}, "splits: must be a mapping"),
        ({"splits": {"train": {"labels": "labels/train"}}}, r"splits\.train\.images: must be a string, got nothing"),
        ({"splits": {"train": TRAIN, "b": {"images": "x", "labels": "y.json"}}}, "splits: labels must be folders"),
        ({"splits": {"train": {**TRAIN, "masks": "x"}}}, "splits: masks are for panoptic labels only"),
        ({"name": "a b"}, "name: must have letters"),
        (
            {"splits": {"train": {**TRAIN, "images": "nowhere"}}},
            r"splits\.train\.images: .*nowhere does not exist; it must be a folder",
        ),
        (
            {"splits": {"train": {**TRAIN, "labels": "nowhere"}}},
            r"splits\.train\.labels: .*nowhere does not exist",
        ),
        ({"splits": {"train": {**TRAIN, "images": "empty"}}}, r"splits\.train\.images: there are no images"),
        (
            {"splits": {"train": {**TRAIN, "labels": "empty"}}},
            r"splits\.train\.labels: 4 of 4 images have no label map",
        ),
    ],
)
def test_a_mistake_in_a_semantic_set_names_file_and_key(tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    file = semantic_set(tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"beach\.yaml: {message}"):
        registered(file)


@pytest.mark.parametrize("text", ["", "- a\n", "splits: [\n", "a: !!python/name:os.system\n", "name: x\nname: y\n"])
def test_a_file_that_is_no_data_set_file_is_named(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        read_dataset_file(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.yaml"):
        read_dataset_file(tmp_path / "none.yaml")


def test_aliases_that_expand_without_limit_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="expanded aliases"):
        read_dataset_file(tmp_path / "bomb.yaml")


def change_json(folder, change):
    path = folder / "panoptic_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"].append(c["categories"][0]), "labels: the category 10 occurs twice"),
        (lambda c: c["categories"][0].pop("isthing"), "labels: the category 10 .* must have isthing 0 or 1"),
        (lambda c: c.pop("annotations"), "labels: .*must have the lists images, annotations, categories"),
        (lambda c: c["annotations"].clear(), "labels: .* has no annotations"),
        (lambda c: c["images"][0].pop("height"), r"labels: .* is not in COCO's panoptic format \(KeyError: 'height'"),
        (lambda c: c["annotations"][0].update(file_name="../a.png"), r"labels: the mask \.\./a\.png"),
        (
            lambda c: c["annotations"][0].update(file_name="a.png"),
            "labels: 1 of 4 annotations .*the mask a.png is not in",
        ),
        (lambda c: c["images"][0].update(file_name="a.jpg"), "labels: 1 of 4 annotations .*the image a.jpg is not in"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=7), "labels: .*KeyError: 7"),
    ],
)
def test_a_mistake_in_a_panoptic_json_names_file_and_key(tmp_path, change, message):
    file = panoptic_set(tmp_path)
    # The other split is larger, so that categories come from this one.
    (tmp_path / "panoptic_val.json").write_text((tmp_path / "panoptic_val.json").read_text() + " " * 10_000)
    change_json(tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"boats\.yaml: splits\.train\.{message}"):
        registered(file)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["sand", "sea"], "classes: must list all categories of .*; missing: boat"),
        (["sand", "sea", "boat", "cat"], r"classes\[3\]: .* has no category 'cat'"),
        (["sand", "sea", {"name": "boat", "thing": False}], r"classes\[2\]\.thing: 'boat' is a thing"),
    ],
)
def test_classes_must_be_the_categories_of_the_json(tmp_path, classes, message):
    with pytest.raises(ValueError, match=rf"boats\.yaml: {message}"):
        register_dataset_file(panoptic_set(tmp_path, classes=classes))


def add_a_category(categories):
    categories.append({"id": 40, "name": "bird", "isthing": 1})


def make_stuff_a_thing(categories):
    categories[1]["isthing"] = 1


@pytest.mark.parametrize("change", [add_a_category, make_stuff_a_thing])
def test_splits_must_have_the_same_categories_and_things(tmp_path, change):
    file = panoptic_set(tmp_path)
    path = tmp_path / "panoptic_val.json"
    content = json.loads(path.read_text())
    change(content["categories"])
    # Categories are taken from the smallest file.
    path.write_text(json.dumps(content) + " " * 10_000)
    register_dataset_file(file)
    message = r"splits\.val\.labels: .* has other categories, or other things \(isthing\), than the other splits"
    with pytest.raises(ValueError, match=message):
        DatasetCatalog.get("boats_val")


def test_files_of_many_megabytes_are_refused(tmp_path):
    file = semantic_set(tmp_path)
    file.write_text(f"# {'x' * 2**23}\n{file.read_text()}")
    with pytest.raises(ValueError, match=r"beach\.yaml has more than 4 MiB"):
        register_dataset_file(file)
