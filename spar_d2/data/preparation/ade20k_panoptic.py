"""ADE20K's classes and instances as panoptic labels, as Mask2Former makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spar_d2.data.datasets import class_names
from spar_d2.data.datasets.colors import voc_colors
from spar_d2.data.preparation.ade20k import FOLDER, photos_and_classes
from spar_d2.data.preparation.common import ArchiveSpec, classes_in, read_pixels, read_values, without_background
from spar_d2.data.preparation.folders import FilePattern
from spar_d2.data.preparation.panoptic import PanopticLabels, PanopticPreparation, areas_and_boxes

_THINGS = np.array(class_names.ADE20K_THINGS)
# A segment's id: this times its class, counted from 1, plus the number of the instance; 0 for stuff.
_INSTANCES = 1000


class Ade20kPanopticPreparation(PanopticPreparation):
    """Stuff by the semantic labels, and over it things by the instances; what is neither is void.

    Where they overlap a pixel is the thing's. Area and box of the stuff stay those of the semantic labels, as in the
    files that published results were measured with, and a stuff segment that is covered wholly stays in the list.

    Args:
        name: of the data set.
        split: "val" or "train".
    """

    def __init__(self, name: str, split: str) -> None:
        super().__init__(
            name,
            split,
            "ade20k" if split == "val" else "ade20k_train",
            *photos_and_classes(split),
            without_background(len(class_names.ADE20K)),
            f"{FOLDER}/ade20k_panoptic_{split}",
            categories(),
        )
        site = "sceneparsing.csail.mit.edu/data/ChallengeData2017"
        place = ArchiveSpec((f"{FOLDER}/annotations_instance/{self.part}",), "annotations_instance.tar", site, FOLDER)
        self.instances = FilePattern(place, ".png")

    def labels(self, root: Path) -> PanopticLabels:
        # The archive of the images is that of the classes, and named when those are looked for.
        for official in (self.instances, self.official):
            official.place.find(root)
        return _ClassesAndInstances(self, root)

    def image_file(self, identity: str) -> str:
        return f"{identity}.jpg"


class _ClassesAndInstances(PanopticLabels):
    """Official files of classes and of instances.

    Args:
        preparation: says which they are.
        root: the folder of all data sets.
    """

    def __init__(self, preparation: Ade20kPanopticPreparation, root: Path) -> None:
        self.preparation, self.root = preparation, root

    def files(self, name: str) -> tuple[Path, ...]:
        return tuple(files.file(self.root, name) for files in (self.preparation.official, self.preparation.instances))

    def segments(self, name: str) -> tuple[np.ndarray, list[dict]]:
        semantic, instances = self.files(name)
        classes = classes_in(semantic, read_values(semantic), self.preparation.table)
        numbers, class_of = read_instances(instances)
        if numbers.shape != classes.shape:
            sizes = " and ".join(f"{width}x{height}" for height, width in (classes.shape, numbers.shape))
            raise ValueError(f"the label files {semantic} and {instances} differ in size: {sizes} pixels")
        stuff_ids = np.zeros(256, dtype=np.int32)
        is_stuff = np.setdiff1d(np.arange(len(class_names.ADE20K)), _THINGS)
        stuff_ids[is_stuff] = (is_stuff + 1) * _INSTANCES
        thing_ids = (class_of + 1) * _INSTANCES + np.arange(256, dtype=np.int32)
        stuff = stuff_ids[classes]
        segments = [_segment(number, place) for number, place in areas_and_boxes(stuff).items()]
        segments += [_segment(int(thing_ids[number]), place) for number, place in areas_and_boxes(numbers).items()]
        return np.where(numbers > 0, thing_ids[numbers], stuff), segments


def _segment(number: int, place: dict) -> dict:
    return {"id": number, "category_id": number // _INSTANCES - 1, **place, "iscrowd": 0}


def read_instances(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The instances in an official file: red is a class of things from 1 on, green the number of one in the image.

    Returns:
        (H, W) uint8, the number of each pixel's instance, 0 for none; and (256,), the class in ADE20K of each number.

    Raises:
        ValueError: it cannot be read, is no RGB picture, or an instance has several classes or one that is none.
    """
    mode, pixels = read_pixels(path)
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"the label image {path} must be RGB (class and number of instances), its mode is {mode}")
    kinds, numbers = pixels[..., 0], pixels[..., 1]
    pairs = np.bincount((numbers.astype(np.int32) * 256 + kinds).ravel(), minlength=256 * 256).reshape(256, 256) > 0
    pairs[0] = False
    several = np.flatnonzero(pairs.sum(axis=1) > 1)
    if len(several):
        found = ", ".join(map(str, np.flatnonzero(pairs[several[0]]).tolist()))
        raise ValueError(f"the label file {path} has several classes for the instance {several[0]}: {found}")
    wrong = [value for value in np.flatnonzero(pairs.any(axis=0)).tolist() if not 1 <= value <= len(_THINGS)]
    if wrong:
        raise ValueError(f"the label file {path} has an instance of the class {wrong[0]}, not of 1..{len(_THINGS)}")
    class_of = np.zeros(256, dtype=np.int32)
    number, kind = np.nonzero(pairs)
    class_of[number] = _THINGS[kind - 1]
    return numbers, class_of


def categories() -> list[dict]:
    """The classes in COCO's form."""
    names, things = class_names.ADE20K, set(_THINGS.tolist())
    # Less black, which is for no class.
    colors = voc_colors(len(names) + 1)[1:].tolist()
    return [
        {"id": number, "name": name, "isthing": int(number in things), "color": color}
        for number, (name, color) in enumerate(zip(names, colors))
    ]
