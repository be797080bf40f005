"""Small copies of the benchmarks' official archives, unpacked, with labels drawn at random.

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
    "voc21": ("palette", "colours", "beside"),
    "voc20": ("palette", "colours", "beside"),
    "cityscapes": ("ids",),
    "ade20k": ("grey",),
    "context60": ("59", "59 unlisted", "459", "converted"),
    "context59": ("59", "59 unlisted", "459", "converted"),
    "coco_object": ("stuff things", "folder of the archive"),
}
CASES = [(name, form) for name, forms in FORMS.items() for form in forms]
# Red, green and blue of VOC's labels 0, 1, ..., 20.
VOC_COLOURS = """
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
    """Write three validation images of a benchmark with official labels.

    Two benchmarks of the same images (voc20 and voc21, context59 and context60) can be in one root if they are made
    with generators of one seed.

    Args:
        name: of the benchmark.
        root: the folder of all data sets.
        rng: draws pixels and labels.
        form: one of ``FORMS``; default: the first.

    Returns:
        For every image, by its "image_id" in Detectron2's dataset dicts, the labels to expect, (H, W) uint8.
    """
    form = form or FORMS[name][0]
    makers = {"voc": _make_voc, "con": _make_context, "ade": _make_ade20k, "cit": _make_cityscapes, "coc": _make_coco}
    official, meaning = makers[name[:3]](root, rng, form, background=name in ("voc21", "context60"))
    return {key: _translated(values, meaning) for key, values in official.items()}


def tree(name: str, root: Path, form: str = "", seed: int = 0) -> dict[str, np.ndarray]:
    """:func:`make_tree` by a seed."""
    return make_tree(name, root, np.random.default_rng(seed), form)


def use_trees(root: Path, monkeypatch) -> None:
    """For the rest of a test, ``root`` is the folder of all data sets, and each benchmark has three images."""
    from spar_d2.data.benchmarks import BENCHMARKS

    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    for name, benchmark in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(benchmark, images=len(SIZES)))


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


def _write_grey(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def _less_one(value: int) -> int:
    return IGNORED if value in (0, IGNORED) else value - 1


def _unchanged(value: int) -> int:
    return value


def _make_voc(root: Path, rng: np.random.Generator, form: str, background: bool):
    folder = root / ("VOC2012" if form == "beside" else "VOCdevkit/VOC2012")
    official = _draw(rng, ["2007_000033", "2007_000042", "2011_003271"], [*range(21), IGNORED])
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[:21] = [[int(part) for part in colour.split()] for colour in VOC_COLOURS.split(",")]
    palette[IGNORED] = VOC_BORDER
    (folder / "SegmentationClass").mkdir(parents=True, exist_ok=True)
    for key, values in official.items():
        _write_photo(folder / "JPEGImages" / f"{key}.jpg", rng, values.shape)
        image = Image.fromarray(values)
        image.putpalette(palette.tobytes())
        (image.convert("RGB") if form == "colours" else image).save(folder / "SegmentationClass" / f"{key}.png")
    # One of the training images, which are in the same folders.
    _write_photo(folder / "JPEGImages" / "2007_000032.jpg", rng, (9, 9))
    _write_lines(folder / "ImageSets/Segmentation/val.txt", official)
    return official, _unchanged if background else _less_one


def _make_context(root: Path, rng: np.random.Generator, form: str, background: bool):
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
            _write_grey(images / f"{key}.png", values)
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


def _make_ade20k(root: Path, rng: np.random.Generator, form: str, background: bool):
    folder = root / "ADEChallengeData2016"
    official = _draw(rng, [f"ADE_val_{number:08d}" for number in (1, 2, 3)], list(range(151)))
    for key, values in official.items():
        _write_photo(folder / "images/validation" / f"{key}.jpg", rng, values.shape)
        _write_grey(folder / "annotations/validation" / f"{key}.png", values)
    return official, _less_one


def _make_cityscapes(root: Path, rng: np.random.Generator, form: str, background: bool):
    from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

    folder = root / "cityscapes"
    keys = [f"{city}/{city}_000000_{n:06d}" for city, n in (("frankfurt", 294), ("frankfurt", 576), ("lindau", 19))]
    official = _draw(rng, keys, list(range(34)))
    for key, values in official.items():
        _write_photo(folder / "leftImg8bit/val" / f"{key}_leftImg8bit.png", rng, values.shape)
        _write_grey(folder / "gtFine/val" / f"{key}_gtFine_labelIds.png", values)
        _write_grey(folder / "gtFine/val" / f"{key}_gtFine_instanceIds.png", values)
    evaluated = {category["id"]: category["trainId"] for category in CITYSCAPES_CATEGORIES}
    return official, lambda value: evaluated.get(value, IGNORED)


def _make_coco(root: Path, rng: np.random.Generator, form: str, background: bool):
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    folder = root / "coco"
    maps = "stuffthingmaps" if form == "stuff things" else "stuffthingmaps_trainval2017"
    official = _draw(rng, ["000000000139", "000000000285", "000000000632"], [*range(182), IGNORED])
    for key, values in official.items():
        _write_photo(folder / "val2017" / f"{key}.jpg", rng, values.shape)
        _write_grey(folder / maps / "val2017" / f"{key}.png", values)
    things = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
    classes = {identity - 1: number for number, identity in enumerate(things, 1)}
    return official, lambda value: IGNORED if value == IGNORED else classes.get(value, 0)


def _write_lines(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
