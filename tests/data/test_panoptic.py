"""Panoptic data sets: registration, small copies of official files, and the synthetic data set."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, COCO_CATEGORIES
from PIL import Image

from reference import SHARED
from spar_d2.data.datasets import class_names
from spar_d2.data.datasets.panoptic import is_panoptic, load_panoptic, panoptic_datasets, read_segment_ids
from spar_d2.data.datasets.scenes import SCENE_SPLITS, load_scenes
from spar_d2.evaluation import PanopticEvaluator
from spar_d2.toy.scenes import GROUNDS, OBJECTS, SCENE_CLASSES, large_scene

SAMPLE = SHARED / "data" / "coco_panoptic_sample"
SPLITS = {"train": "training", "val": "validation"}
# Of every kind, by split: folder of images, JSON, folder of masks, and an image with its id and its mask's name.
PLACES = {
    "coco": lambda split: (
        f"coco/{split}2017",
        f"coco/annotations/panoptic_{split}2017.json",
        f"coco/panoptic_{split}2017",
        lambda n: (f"{n:012d}.jpg", f"{n:012d}.jpg", n, f"{n:012d}.png"),
    ),
    "cityscapes": lambda split: (
        f"cityscapes/leftImg8bit/{split}",
        f"cityscapes/gtFine/cityscapes_panoptic_{split}.json",
        f"cityscapes/gtFine/cityscapes_panoptic_{split}",
        lambda n: (
            f"lindau/lindau_000000_{n:06d}_leftImg8bit.png",
            f"lindau_000000_{n:06d}_gtFine_leftImg8bit.png",
            f"lindau_000000_{n:06d}",
            f"lindau_000000_{n:06d}_gtFine_panoptic.png",
        ),
    ),
    "ade20k": lambda split: (
        f"ADEChallengeData2016/images/{SPLITS[split]}",
        f"ADEChallengeData2016/ade20k_panoptic_{split}.json",
        f"ADEChallengeData2016/ade20k_panoptic_{split}",
        lambda n: (f"ADE_{split}_{n:08d}.jpg", f"ADE_{split}_{n:08d}.jpg", f"ADE_{split}_{n:08d}", f"ADE_{n:08d}.png"),
    ),
}
KINDS = [(kind, split) for kind in PLACES for split in SPLITS]
SIZES = ((20, 31), (33, 17))


def official(kind: str) -> dict[int, tuple[str, bool]]:
    """Name of every category by its id, and whether it is a thing."""
    if kind == "ade20k":
        return {number: (name, number in class_names.ADE20K_THINGS) for number, name in enumerate(class_names.ADE20K)}
    categories = COCO_CATEGORIES if kind == "coco" else CITYSCAPES_CATEGORIES
    return {category["id"]: (category["name"], category["isthing"] == 1) for category in categories}


def make_tree(root: Path, kind: str, split: str) -> list[dict]:
    """Write two images of random segments; returns the JSON's annotations, with "image", the path of the image."""
    rng = np.random.default_rng(5)
    images, labels, masks, names = PLACES[kind](split)
    categories = official(kind)
    content = {"images": [], "annotations": [], "categories": [{"id": number} for number in categories]}
    for index, (height, width) in enumerate(SIZES):
        file, listed, key, mask = names(index + 1)
        ids = np.concatenate([[0], rng.choice(np.arange(1, 2**24), 12, replace=False)])
        write_ids(root / masks / mask, rng.choice(ids, (height, width)))
        (root / images / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / images / file)
        content["images"].append({"id": key, "file_name": listed, "height": height, "width": width})
        segments = [
            {"id": int(number), "category_id": int(category), "iscrowd": 0}
            for number, category in zip(ids[1:], rng.choice(list(categories), 12))
        ]
        thing = next(number for number, (_, thing) in categories.items() if thing)
        segments[0] |= {"category_id": thing, "iscrowd": 1}
        del segments[1]["iscrowd"]
        content["annotations"].append({"image_id": key, "file_name": mask, "segments_info": segments})
    # The order of images says nothing about that of annotations.
    content["images"].reverse()
    (root / labels).parent.mkdir(parents=True, exist_ok=True)
    (root / labels).write_text(json.dumps(content))
    return [
        {**annotation, "image": str(root / images / names(index + 1)[0])}
        for index, annotation in enumerate(content["annotations"])
    ]


def write_ids(path: Path, ids: np.ndarray) -> None:
    pixels = np.zeros((*ids.shape, 3), dtype=np.uint8)
    for y, x in np.ndindex(ids.shape):
        number = int(ids[y, x])
        pixels[y, x] = number & 255, number >> 8 & 255, number >> 16
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The folder of all data sets, empty; three scenes in each split."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split, (seed, _) in SCENE_SPLITS.items():
        monkeypatch.setitem(SCENE_SPLITS, split, (seed, 3))
    return tmp_path


def test_all_are_registered_beside_the_plain_ones():
    kinds = {f"spar_{kind}_panoptic_{split}" for kind, split in KINDS}
    scenes = {f"spar_scenes_panoptic_{split}" for split in ("train", "tune", "val")}
    assert set(panoptic_datasets()) == kinds | scenes
    assert kinds | scenes <= set(DatasetCatalog.list())
    assert all(is_panoptic(name) for name in kinds | scenes)
    assert not any(is_panoptic(name) for name in ("spar_scenes_val", "coco_2017_val_panoptic_separated", "voc21"))


@pytest.mark.parametrize("kind", [*PLACES, "scenes"])
def test_metadata_are_in_the_separated_form(kind):
    metadata = MetadataCatalog.get(f"spar_{kind}_panoptic_val")
    if kind == "scenes":
        categories = {number: (name, name in OBJECTS) for number, name in enumerate(SCENE_CLASSES, 1)}
    else:
        categories = official(kind)
    things = [number for number, (_, thing) in categories.items() if thing]
    stuff = [number for number, (_, thing) in categories.items() if not thing]
    assert metadata.thing_dataset_id_to_contiguous_id == {number: place for place, number in enumerate(things)}
    assert metadata.stuff_dataset_id_to_contiguous_id == {number: place + 1 for place, number in enumerate(stuff)}
    assert metadata.thing_classes == [categories[number][0] for number in things]
    assert metadata.stuff_classes == ["things", *(categories[number][0] for number in stuff)]
    for colors, classes in (
        (metadata.thing_colors, metadata.thing_classes),
        (metadata.stuff_colors, metadata.stuff_classes),
    ):
        assert np.array(colors).shape == (len(classes), 3)
        assert len({tuple(color) for color in colors}) == len(classes)
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
    assert metadata.evaluator_type == "coco_panoptic_seg"


@pytest.mark.parametrize(
    ("kind", "things", "stuff"), [("coco", 80, 53), ("cityscapes", 8, 11), ("ade20k", 100, 50), ("scenes", 8, 5)]
)
def test_numbers_of_classes(kind, things, stuff):
    metadata = MetadataCatalog.get(f"spar_{kind}_panoptic_train")
    assert (len(metadata.thing_classes), len(metadata.stuff_classes)) == (things, stuff + 1)


def test_coco_is_numbered_as_by_detectron2():
    """Its own data set with separated things and stuff."""
    ours = MetadataCatalog.get("spar_coco_panoptic_val")
    theirs = MetadataCatalog.get("coco_2017_val_panoptic_separated")
    assert ours.thing_classes == theirs.thing_classes
    assert ours.thing_dataset_id_to_contiguous_id == theirs.thing_dataset_id_to_contiguous_id
    assert {0: 0, **ours.stuff_dataset_id_to_contiguous_id} == theirs.stuff_dataset_id_to_contiguous_id
    assert len(ours.stuff_classes) == len(theirs.stuff_classes)


@pytest.mark.parametrize(("kind", "split"), KINDS)
def test_records(root, kind, split):
    annotations = make_tree(root, kind, split)
    records = DatasetCatalog.get(f"spar_{kind}_panoptic_{split}")
    metadata = MetadataCatalog.get(f"spar_{kind}_panoptic_{split}")
    assert [record["image_id"] for record in records] == [annotation["image_id"] for annotation in annotations]
    for record, annotation, (height, width) in zip(records, annotations, SIZES):
        assert record["file_name"] == annotation["image"]
        assert (record["height"], record["width"]) == (height, width)
        assert read_segment_ids(record["pan_seg_file_name"]).shape == (height, width)
        assert len(record["segments_info"]) == len(annotation["segments_info"])
        for ours, theirs in zip(record["segments_info"], annotation["segments_info"]):
            name, thing = official(kind)[theirs["category_id"]]
            classes = metadata.thing_classes if thing else metadata.stuff_classes
            assert classes[ours["category_id"]] == name
            assert ours["isthing"] is thing
            assert (ours["id"], ours["iscrowd"]) == (theirs["id"], theirs.get("iscrowd", 0))
    for key in ("panoptic_json", "panoptic_root", "image_root"):
        assert Path(metadata.get(key)).is_relative_to(root)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coco", "scenes"])
def test_another_root_may_follow(root, kind):
    name = f"spar_{kind}_panoptic_val"
    for folder in (root / "one", root / "two"):
        if kind == "coco":
            make_tree(folder, kind, "val")
        (first, *_) = load_panoptic(name, folder)
        assert Path(first["file_name"]).is_relative_to(folder)
        metadata = MetadataCatalog.get(name)
        assert json.loads(Path(metadata.panoptic_json).read_text())["images"]
        assert all(Path(metadata.get(key)).is_relative_to(folder) for key in ("panoptic_json", "panoptic_root"))


REMEDIES = {
    "coco": "panoptic_annotations_trainval2017.zip",
    "cityscapes": "spar-d2 prepare cityscapes_panoptic",
    "ade20k": "spar-d2 prepare ade20k_panoptic",
}


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["all", "image", "labels", "mask", "masks"])
@pytest.mark.parametrize("kind", PLACES)
def test_missing_parts_are_named(root, kind, missing):
    images, labels, masks, names = PLACES[kind]("val")
    path = root / {"image": f"{images}/{names(1)[0]}", "mask": f"{masks}/{names(1)[3]}", "masks": masks}.get(
        missing, labels
    )
    if missing != "all":
        make_tree(root, kind, "val")
        path.rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError) as error:
        DatasetCatalog.get(f"spar_{kind}_panoptic_val")
    for part in (f"spar_{kind}_panoptic_val", str(path), "DETECTRON2_DATASETS", REMEDIES[kind]):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "{",
        lambda content: "[1]",
        lambda content: json.dumps({**content, "images": content["images"][:1]}),
        lambda content: json.dumps({**content, "annotations": [{**content["annotations"][0], "segments_info": 3}]}),
        lambda content: json.dumps({key: value for key, value in content.items() if key != "annotations"}),
        lambda content: json.dumps(content).replace('"category_id": ', '"category_id": 7000'),
        lambda content: json.dumps(content).replace('"file_name"', '"name"'),
    ],
    ids=["cut off", "list", "too few images", "no segments", "no annotations", "other classes", "no names"],
)
def test_files_in_another_form_are_named(root, change):
    make_tree(root, "ade20k", "val")
    path = root / PLACES["ade20k"]("val")[1]
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=f"spar_ade20k_panoptic_val.*{path.name}.*COCO's panoptic form"):
        load_panoptic("spar_ade20k_panoptic_val")


def test_a_name_that_is_none_of_them():
    with pytest.raises(ValueError, match="name .*spar_coco_panoptic_train, .*, got 'coco'"):
        load_panoptic("coco")


def test_masks_that_cannot_be_read(tmp_path):
    path = tmp_path / "mask.png"
    with pytest.raises(FileNotFoundError, match=str(path)):
        read_segment_ids(path)
    write_ids(path, np.random.default_rng(0).integers(0, 2**24, (40, 30)))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        read_segment_ids(path)
    path.write_bytes(b"mask")
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        read_segment_ids(path)
    Image.new("L", (4, 4)).save(path)
    with pytest.raises(ValueError, match=f"{path} must be RGB, .* its mode is L"):
        read_segment_ids(path)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (64, 48)])
def test_numbers_of_segments_are_read_as_written(tmp_path, size):
    ids = np.random.default_rng(1).integers(0, 2**24, size)
    ids[0, 0] = 2**24 - 1
    write_ids(tmp_path / "mask.png", ids)
    read = read_segment_ids(tmp_path / "mask.png")
    assert read.dtype == np.int32
    assert np.array_equal(read, ids)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "tune", "val"])
def test_scenes_have_the_segments_that_are_drawn(root, split):
    """Every object has its class in all its pixels, every ground is where its label is, the rest are remnants."""
    records = DatasetCatalog.get(f"spar_scenes_panoptic_{split}")
    content = json.loads(Path(MetadataCatalog.get(f"spar_scenes_panoptic_{split}").panoptic_json).read_text())
    assert len(records) == len(content["annotations"]) == 3
    plain = load_scenes(split)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for index, (record, annotation) in enumerate(zip(records, content["annotations"])):
        for key in ("file_name", "height", "width", "image_id"):
            assert record[key] == plain[index][key]
        scene = large_scene(SCENE_SPLITS[split][0], index)
        ids = read_segment_ids(record["pan_seg_file_name"])
        counts = Counter(scene.objects[scene.objects > 0].tolist())
        grounds = Counter(scene.labels[scene.objects == 0].tolist())
        seen = sum(pixels >= 4 for pixels in (*counts.values(), *grounds.values()))
        assert len(annotation["segments_info"]) == seen
        for ours, segment in zip(record["segments_info"], annotation["segments_info"]):
            ys, xs = np.nonzero(ids == segment["id"])
            (label,) = set(scene.labels[ys, xs].tolist())
            (number,) = set(scene.objects[ys, xs].tolist())
            assert names[segment["category_id"]] == SCENE_CLASSES[label]
            assert ours["isthing"] is (number > 0)
            assert (OBJECTS if number else ("things", *GROUNDS))[ours["category_id"]] == SCENE_CLASSES[label]
            assert segment["area"] == len(ys) == (counts[number] if number else grounds[label])
            assert segment["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert segment["iscrowd"] == ours["iscrowd"] == 0
        assert {int(number) for number in np.unique(ids)} - {0} == {one["id"] for one in annotation["segments_info"]}
        assert all(counts[number] < 4 for number in scene.objects[ids == 0].tolist())


def test_scenes_are_drawn_once(root):
    records = DatasetCatalog.get("spar_scenes_panoptic_val")
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    assert len(written) == 3 * 3 + 1
    assert DatasetCatalog.get("spar_scenes_panoptic_val") == records
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.*")} == written


@pytest.mark.processes
@pytest.mark.slow
def test_several_processes_may_load_scenes_at_once(root):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        one, other = pool.map(load_panoptic, ["spar_scenes_panoptic_tune"] * 2, chunksize=1)
    assert one == other == load_panoptic("spar_scenes_panoptic_tune")
    assert not list(root.rglob("*.tmp*"))


def test_the_truth_of_scenes_has_full_marks(root):
    """The evaluator finds the files by itself, where they are only drawn when it asks for them."""
    name = "spar_scenes_panoptic_tune"
    evaluator = PanopticEvaluator(name, distributed=False)
    for record in load_panoptic(name):
        ids = torch.from_numpy(read_segment_ids(record["pan_seg_file_name"]))
        evaluator.process([record], [{"panoptic_seg": (ids, record["segments_info"])}])
    scores = evaluator.evaluate()["panoptic_seg"]
    assert scores["PQ"] == scores["PQ_th"] == scores["PQ_st"] == pytest.approx(100)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no photos of COCO in {SAMPLE}")
def test_photos_of_coco(root):
    images, labels, masks, _ = PLACES["coco"]("val")
    for place, target in ((images, "input_images"), (masks, "panoptic_examples"), (labels, "panoptic_examples.json")):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(SAMPLE / target)
    records = DatasetCatalog.get("spar_coco_panoptic_val")
    annotations = json.loads((SAMPLE / "panoptic_examples.json").read_text())["annotations"]
    assert len(records) == len(annotations) == 2
    for record, annotation in zip(records, annotations):
        with Image.open(record["file_name"]) as photo:
            assert photo.size == (record["width"], record["height"])
        counts = Counter(read_segment_ids(record["pan_seg_file_name"]).ravel().tolist())
        assert {one["id"]: one["area"] for one in annotation["segments_info"]} == {
            number: count for number, count in counts.items() if number
        }
        assert set(counts) - {0} == {one["id"] for one in record["segments_info"]}
