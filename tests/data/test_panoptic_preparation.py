"""Official label files to panoptic labels, against loops over all pixels."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from PIL import Image

from label_trees import PANOPTIC, SIZES, official_files, tree, use_trees
from spar_d2.data.datasets import class_names
from spar_d2.data.preparation import prepare, survey
from spar_d2.data.preparation.panoptic import areas_and_boxes
from spar_d2.data.preparation.registry import PREPARATIONS
from spar_d2.utils.id_maps import as_colors

# test_preparation.py and test_preparation_errors.py have quick tests of the same code.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder of all data sets, each of which has three images."""
    use_trees(tmp_path, monkeypatch)
    return tmp_path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def read_index(name, root):
    return json.loads(PREPARATIONS[name].index(root).read_text())


def segment_of(name, files):
    """(category, instance) by pixel (y, x), None for void; and the pixels of stuff under a thing."""
    places, covered = {}, []
    if name.startswith("cityscapes"):
        evaluated = {category["id"] for category in CITYSCAPES_CATEGORIES}
        for place, value in np.ndenumerate(pixels(files[0])):
            category = value if value < 1000 else value // 1000
            places[place] = (int(category), int(value)) if category in evaluated else None
        return places, covered
    instances = pixels(files[1])
    for place, value in np.ndenumerate(pixels(files[0])):
        red, green, _ = instances[place].tolist()
        stuff = value > 0 and int(value) - 1 not in class_names.ADE20K_THINGS
        if green:
            places[place] = (class_names.ADE20K_THINGS[red - 1], green)
            covered += [(place, int(value) - 1)] if stuff else []
        else:
            places[place] = (int(value) - 1, 0) if stuff else None
    return places, covered


def slow_segments(places, covered):
    """Area, box and category of each segment, by (category, instance); stuff counts where things cover it, too."""
    inside = {}
    for place, key in [*places.items(), *((place, (category, 0)) for place, category in covered)]:
        if key is not None:
            inside.setdefault(key, []).append(place)
    found = {}
    for key, where in inside.items():
        ys, xs = [y for y, _ in where], [x for _, x in where]
        box = [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
        found[key] = (key[0], len(where), box)
    return found


def check(name, root):
    """Compare all written files with the results of loops over the official files."""
    preparation, content = PREPARATIONS[name], read_index(name, root)
    files = official_files(name, root)
    assert [image["id"] for image in content["images"]] == [key.split("/")[-1] for key in files]
    for key, image, annotation in zip(files, content["images"], content["annotations"], strict=True):
        picture = pixels(preparation.folder(root) / annotation["file_name"])
        assert preparation.prepared(root, key).name == annotation["file_name"]
        assert (picture.shape, picture.dtype) == ((image["height"], image["width"], 3), np.uint8)
        assert image["id"] == annotation["image_id"]
        ending = "_gtFine_leftImg8bit.png" if name.startswith("cityscapes") else ".jpg"
        assert image["file_name"] == image["id"] + ending
        ids = picture.astype(np.int64) @ [1, 256, 65536]
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert len(segments) == len(annotation["segments_info"]) and 0 not in segments
        places, covered = segment_of(name, files[key])
        expected = slow_segments(places, covered)
        # Each segment has one id.
        pairs = {(segment, int(ids[place])) for place, segment in places.items()} - {(None, 0)}
        id_of = dict(pairs)
        assert len(id_of) == len(pairs) == len({number for _, number in pairs})
        whole = {number: (s["category_id"], s["area"], s["bbox"]) for number, s in segments.items()}
        for segment, found in expected.items():
            if segment in id_of:
                assert whole.pop(id_of[segment]) == found
            else:  # stuff that is covered wholly, whose id is in no pixel
                number = next(number for number, values in whole.items() if values == found)
                assert whole.pop(number) and number not in ids
        assert not whole


@pytest.mark.parametrize("name", PANOPTIC)
def test_every_pixel(name, root):
    tree(PANOPTIC[name], root)
    assert survey(name).advice == "prepare"
    done = prepare(name)
    assert (done.images, done.written, done.folder) == (3, 3, PREPARATIONS[name].folder(root))
    assert survey(name).advice == ""
    check(name, root)


@pytest.mark.parametrize("seed", range(4))
def test_every_pixel_of_other_files(seed, root):
    for name in ("cityscapes_panoptic_val", "ade20k_panoptic_val"):
        tree(PANOPTIC[name], root, seed=seed + 1)
        prepare(name)
        check(name, root)


def test_fully_covered_stuff_keeps_its_area(root):
    tree("ade20k", root)
    semantic, instances = next(iter(official_files("ade20k_panoptic_val", root).values()))
    values = np.full(SIZES[0], 3, dtype=np.uint8)  # sky
    values[2:5, 4:8] = 1  # wall
    Image.fromarray(values).save(semantic)
    values = np.zeros((*SIZES[0], 3), dtype=np.uint8)
    values[1:7, 3:9] = (1, 5, 0)  # one bed
    Image.fromarray(values).save(instances)
    prepare("ade20k_panoptic_val")
    check("ade20k_panoptic_val", root)
    segments = read_index("ade20k_panoptic_val", root)["annotations"][0]["segments_info"]
    assert [(s["category_id"], s["area"], s["bbox"]) for s in segments] == [
        (0, 12, [4, 2, 4, 3]),
        (2, 37 * 53 - 12, [0, 0, 53, 37]),
        (7, 36, [3, 1, 6, 6]),
    ]


def test_crowds_are_things_without_instances(root):
    tree("cityscapes", root)
    prepare("cityscapes_panoptic_val")
    things = {category["id"] for category in CITYSCAPES_CATEGORIES if category["isthing"]}
    segments = [s for a in read_index("cityscapes_panoptic_val", root)["annotations"] for s in a["segments_info"]]
    assert {s["id"] for s in segments if s["iscrowd"]} == things
    assert any(s["category_id"] in things and not s["iscrowd"] for s in segments)


def test_void_alone(root):
    tree("cityscapes", root)
    (path,) = next(iter(official_files("cityscapes_panoptic_val", root).values()))
    Image.fromarray(np.full(SIZES[0], 29003, dtype=np.uint16)).save(path)
    prepare("cityscapes_panoptic_val")
    assert read_index("cityscapes_panoptic_val", root)["annotations"][0]["segments_info"] == []
    check("cityscapes_panoptic_val", root)


def test_categories(root):
    for name in ("cityscapes_panoptic_val", "ade20k_panoptic_val"):
        tree(PANOPTIC[name], root)
        prepare(name)
    cityscapes = read_index("cityscapes_panoptic_val", root)["categories"]
    for ours, theirs in zip(cityscapes, CITYSCAPES_CATEGORIES, strict=True):
        shown = {"supercategory": ours["supercategory"], "color": list(theirs["color"])}
        assert ours == {**{key: theirs[key] for key in ("id", "name", "isthing")}, **shown}
    groups = [category["supercategory"] for category in cityscapes]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [2, 3, 3, 2, 1, 2, 6]
    ade20k = read_index("ade20k_panoptic_val", root)["categories"]
    assert [(category["id"], category["name"]) for category in ade20k] == list(enumerate(class_names.ADE20K))
    assert tuple(c["id"] for c in ade20k if c["isthing"]) == class_names.ADE20K_THINGS
    assert len({tuple(category["color"]) for category in ade20k}) == 150


@pytest.mark.parametrize("split", ["train", "val"])
def test_detectron2_reads_cityscapes(split, root):
    from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic

    name = f"cityscapes_panoptic_{split}"
    for prepared in (name, PANOPTIC[name]):
        tree(PANOPTIC[name], root)
        prepare(prepared)
    metadata = MetadataCatalog.get(f"cityscapes_fine_panoptic_{split}")
    meta = {
        key: getattr(metadata, key)
        for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id")
    }
    preparation = PREPARATIONS[name]
    images = root / "cityscapes/leftImg8bit" / split
    theirs = load_cityscapes_panoptic(str(images), str(preparation.folder(root)), str(preparation.index(root)), meta)
    assert [record["image_id"] for record in theirs] == [key.split("/")[1] for key in preparation.images(root)]
    for record, size in zip(theirs, SIZES):
        classes = pixels(record["sem_seg_file_name"])
        ids = pixels(record["pan_seg_file_name"]).astype(np.int64) @ [1, 256, 65536]
        assert classes.shape == ids.shape == pixels(record["file_name"]).shape[:2] == size
        # Pixels without a class have no segment, and the reverse.
        mapped = np.full(ids.shape, 255)
        for segment in record["segments_info"]:
            mapped[ids == segment["id"]] = segment["category_id"]
        assert np.array_equal(mapped, classes)


@pytest.mark.parametrize("name", PANOPTIC)
def test_our_data_sets_read_them(name, root):
    tree(PANOPTIC[name], root)
    prepare(name)
    records = DatasetCatalog.get(f"spar_{name}")
    assert [record["file_name"] for record in records] == [str(p) for p in PREPARATIONS[name].images(root).values()]
    for record, annotation in zip(records, read_index(name, root)["annotations"]):
        assert (record["height"], record["width"]) == pixels(record["pan_seg_file_name"]).shape[:2]
        assert [s["id"] for s in record["segments_info"]] == [s["id"] for s in annotation["segments_info"]]


@pytest.mark.parametrize("seed", range(20))
def test_areas_and_boxes(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    values = np.zeros((height, width), dtype=rng.choice([np.uint8, np.uint16, np.int32, np.int64]))
    for _ in range(rng.integers(0, 8)):
        top, left = rng.integers(0, (height, width))
        values[top : top + rng.integers(1, 9), left : left + rng.integers(1, 9)] = rng.integers(0, 250)
    found = areas_and_boxes(values)
    assert list(found) == sorted(set(values.ravel().tolist()) - {0})
    for value, place in found.items():
        where = [key for key, other in np.ndenumerate(values) if other == value]
        rows, columns = zip(*where)
        box = [min(columns), min(rows), max(columns) - min(columns) + 1, max(rows) - min(rows) + 1]
        assert place == {"area": len(where), "bbox": box}


def test_colors_are_digits():
    ids = np.array([[0, 1, 255], [256, 65535, 2**24 - 1]])
    assert as_colors(ids).tolist() == [
        [[0, 0, 0], [1, 0, 0], [255, 0, 0]],
        [[0, 1, 0], [255, 255, 0], [255, 255, 255]],
    ]
