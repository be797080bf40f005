"""Small copies of the data sets' official archives, unpacked, with labels drawn at random.

What the prepared labels must be is worked out here from the data sets' own descriptions, without the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# Heights and widths of the images.
SIZES = ((37, 53), (64, 41), (50, 50))
IGNORED = 255
# Forms that official labels come in; the first is the default.
FORMS = {
    "voc21": ("palette", "colors", "beside"),
    "voc20": ("palette", "colors", "beside"),
    "cityscapes": ("ids",),
    "ade20k": ("gray",),
    "context60": ("59", "59 unlisted", "459", "converted"),
    "context59": ("59", "59 unlisted", "459", "converted"),
    "coco_object": ("stuff things", "folder of the archive"),
    "voc21_train": ("palette", "colors", "beside"),
    "cityscapes_train": ("ids",),
    "ade20k_train": ("gray",),
}
# Panoptic data sets, and those with the same images, whose trees are theirs too.
PANOPTIC = {
    "cityscapes_panoptic_train": "cityscapes_train",
    "cityscapes_panoptic_val": "cityscapes",
    "ade20k_panoptic_train": "ade20k_train",
    "ade20k_panoptic_val": "ade20k",
}
CASES = [(name, form) for name, forms in FORMS.items() for form in forms]
# Red, green and blue of VOC's labels 0, 1, ..., 20.
VOC_COLORS = """
    0 0 0, 128 0 0, 0 128 0, 128 128 0, 0 0 128, 128 0 128, 0 128 128, 128 128 128, 64 0 0, 192 0 0, 64 128 0,
    192 128 0, 64 0 128, 192 0 128, 64 128 128, 192 128 128, 0 64 0, 128 64 0, 0 192 0, 128 192 0, 0 64 128
"""
VOC_BORDER = (224, 224, 192)
CONTEXT = """
    aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
    ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
    keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves,
    sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
"""


def make_tree(name: str, root: Path, rng: np.random.Generator, form: str = "") -> dict[str, np.ndarray]:
    """Write three images of a data set with official labels, of instances too where there are some.

    Two data sets of the same images (voc20 and voc21, context59 and context60) can be in one root if they are made
    with generators of one seed.

    Args:
        name: of the data set.
        root: the folder of all data sets.
        rng: draws pixels and labels.
        form: one of ``FORMS``; default: the first.

    Returns:
        For every image, by its "image_id" in Detectron2's dataset dicts, the labels to expect, (H, W) uint8.
    """
    form = form or FORMS[name][0]
    makers = {"voc": _make_voc, "con": _make_context, "ade": _make_ade20k, "cit": _make_cityscapes, "coc": _make_coco}
    train, background = name.endswith("_train"), name.startswith(("voc21", "context60"))
    official, meaning = makers[name[:3]](root, rng, form, background=background, train=train)
    return {key: _translated(values, meaning) for key, values in official.items()}


def tree(name: str, root: Path, form: str = "", seed: int = 0) -> dict[str, np.ndarray]:
    """:func:`make_tree` by a seed."""
    return make_tree(name, root, np.random.default_rng(seed), form)


def official_files(name: str, root: Path) -> dict[str, tuple[Path, ...]]:
    """Paths of the official label files of each image, by the image's name."""
    from spar_d2.data.preparation.registry import PREPARATIONS

    labels = PREPARATIONS[name].labels(root)
    return {key: labels.files(key) for key in PREPARATIONS[name].images(root)}


def use_trees(root: Path, monkeypatch) -> None:
    """For the rest of a test, ``root`` is the folder of all data sets, each of which has three images."""
    from spar_d2.data.datasets.catalog import BENCHMARKS, TRAINING_SPLITS

    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    for sets in (BENCHMARKS, TRAINING_SPLITS):
        for name, data in sets.items():
            monkeypatch.setitem(sets, name, dataclasses.replace(data, images=len(SIZES)))


def _translated(values: np.ndarray, meaning: Callable[[int], int]) -> np.ndarray:
    labels = np.empty(values.shape, dtype=np.uint8)
    for value in np.unique(values).tolist():
        labels[values == value] = meaning(value)
    return labels


def _draw(rng: np.random.Generator, keys: list[str], values: list[int], kind: type = np.uint8) -> dict[str, np.ndarray]:
    return {key: rng.choice(np.array(values, dtype=kind), size) for key, size in zip(keys, SIZES)}


def _write_photo(path: Path, rng: np.random.Generator, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def _write_gray(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def _less_one(value: int) -> int:
    return IGNORED if value in (0, IGNORED) else value - 1


def _unchanged(value: int) -> int:
    return value


def _make_voc(root: Path, rng: np.random.Generator, form: str, background: bool, train: bool):
    folder = root / ("VOC2012" if form == "beside" else "VOCdevkit/VOC2012")
    keys = ["2007_000039", "2007_000063", "2011_003276"] if train else ["2007_000033", "2007_000042", "2011_003271"]
    official = _draw(rng, keys, [*range(21), IGNORED])
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[:21] = [[int(part) for part in color.split()] for color in VOC_COLORS.split(",")]
    palette[IGNORED] = VOC_BORDER
    (folder / "SegmentationClass").mkdir(parents=True, exist_ok=True)
    for key, values in official.items():
        _write_photo(folder / "JPEGImages" / f"{key}.jpg", rng, values.shape)
        image = Image.fromarray(values)
        image.putpalette(palette.tobytes())
        (image.convert("RGB") if form == "colors" else image).save(folder / "SegmentationClass" / f"{key}.png")
    # One that is in neither list, in the same folder.
    _write_photo(folder / "JPEGImages" / "2007_000027.jpg", rng, (9, 9))
    _write_lines(folder / "ImageSets/Segmentation" / ("train.txt" if train else "val.txt"), official)
    return official, _unchanged if background else _less_one


def _make_context(root: Path, rng: np.random.Generator, form: str, background: bool, train: bool):
    keys = ["2008_000002", "2008_000007", "2010_006079"]
    common = [name.strip() for name in CONTEXT.split(",")]
    voc, folder = root / "VOCdevkit/VOC2010", root / "pascal_context"
    if form == "459":
        official = _draw(rng, keys, list(range(460)), np.uint16)
        names = [f"thing {number}" for number in range(1, 460)]
        for place, name in zip(rng.permutation(459).tolist(), common):
            names[place] = {"table": "diningtable", "tvmonitor": "tv monitor "}.get(name, name)
        _write_mats(folder, official, names)
        names = ["other", *(name.replace(" ", "").replace("diningtable", "table") for name in names)]
    else:
        official = _draw(rng, keys, list(range(60)))
        names = ["other", *common]
        if form == "59":
            names[1:] = rng.permutation(common).tolist()
            _write_lines(folder / "59_labels.txt", (f"{number}: {name}" for number, name in enumerate(names[1:], 1)))
        images = voc / "SegmentationClassContext" if form == "converted" else folder / "59_context_labels"
        for key, values in official.items():
            _write_gray(images / f"{key}.png", values)
    for key, values in official.items():
        _write_photo(voc / "JPEGImages" / f"{key}.jpg", rng, values.shape)
    _write_lines(voc / "ImageSets/Main/val.txt", (f"{key}  1" for key in official))

    def meaning(value: int) -> int:
        number = common.index(names[value]) + 1 if names[value] in common else 0
        return number if background else _less_one(number)

    return official, meaning


def _write_mats(folder: Path, official: dict[str, np.ndarray], names: list[str]) -> None:
    from scipy.io import savemat

    (folder / "trainval").mkdir(parents=True, exist_ok=True)
    for key, values in official.items():
        savemat(folder / "trainval" / f"{key}.mat", {"LabelMap": values}, do_compression=True)
    _write_lines(folder / "labels.txt", (f"{number}: {name}" for number, name in enumerate(names, 1)))


def _make_ade20k(root: Path, rng: np.random.Generator, form: str, background: bool, train: bool):
    folder = root / "ADEChallengeData2016"
    part, short = ("training", "train") if train else ("validation", "val")
    official = _draw(rng, [f"ADE_{short}_{number:08d}" for number in (1, 2, 3)], list(range(151)))
    for key, values in official.items():
        _write_photo(folder / "images" / part / f"{key}.jpg", rng, values.shape)
        _write_gray(folder / "annotations" / part / f"{key}.png", values)
        _write_gray(folder / "annotations_instance" / part / f"{key}.png", _draw_instances(rng, values.shape))
    return official, _less_one


def _draw_instances(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: red is a class of things, green the number of an instance of it; rectangles that may overlap."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    # Of pixels without an instance the class says nothing.
    pixels[..., 0] = rng.integers(0, 101)
    for number in rng.permutation(np.arange(1, 256))[:12]:
        (top, left), (height, width) = rng.integers(0, size), rng.integers(1, 20, 2)
        pixels[top : top + height, left : left + width] = (rng.integers(1, 101), number, rng.integers(0, 256))
    return pixels


def _make_cityscapes(root: Path, rng: np.random.Generator, form: str, background: bool, train: bool):
    from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

    folder, split = root / "cityscapes", "train" if train else "val"
    cities = ("aachen", "aachen", "zurich") if train else ("frankfurt", "frankfurt", "lindau")
    keys = [f"{city}/{city}_000000_{number:06d}" for city, number in zip(cities, (294, 576, 19))]
    official = _draw(rng, keys, list(range(34)))
    for key, values in official.items():
        _write_photo(folder / "leftImg8bit" / split / f"{key}_leftImg8bit.png", rng, values.shape)
        _write_gray(folder / "gtFine" / split / f"{key}_gtFine_labelIds.png", values)
        # Some pixels of classes that have instances are of none.
        single = (values >= 24) & (rng.random(values.shape) < 0.7)
        instances = np.where(single, values.astype(np.int64) * 1000 + rng.integers(0, 4, values.shape), values)
        _write_gray(folder / "gtFine" / split / f"{key}_gtFine_instanceIds.png", instances.astype(np.uint16))
    evaluated = {category["id"]: category["trainId"] for category in CITYSCAPES_CATEGORIES}
    return official, lambda value: evaluated.get(value, IGNORED)


def _make_coco(root: Path, rng: np.random.Generator, form: str, background: bool, train: bool):
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    folder = root / "coco"
    maps = "stuffthingmaps" if form == "stuff things" else "stuffthingmaps_trainval2017"
    official = _draw(rng, ["000000000139", "000000000285", "000000000632"], [*range(182), IGNORED])
    for key, values in official.items():
        _write_photo(folder / "val2017" / f"{key}.jpg", rng, values.shape)
        _write_gray(folder / maps / "val2017" / f"{key}.png", values)
    things = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
    classes = {identity - 1: number for number, identity in enumerate(things, 1)}
    return official, lambda value: IGNORED if value == IGNORED else classes.get(value, 0)


def _write_lines(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
