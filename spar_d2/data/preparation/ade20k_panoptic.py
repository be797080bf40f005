"""ADE20K's panoptic labels, made from its classes and instances as in Mask2Former."""

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
# Segment id = factor * (class + 1) + instance number, which is 0 for stuff.
_INSTANCES = 1000


class Ade20kPanopticPreparation(PanopticPreparation):
    """Stuff from the semantic labels, overlaid with things from the instance labels. All other pixels are void.

    In overlaps, pixels belong to the thing. Area and bounding box of stuff are those of the semantic labels, as in the
    files that published results are measured with, and fully covered stuff segments stay in the list.

    Args:
        name: name of the data set.
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
        # The images' archive is the same as that of the semantic labels, which reports it if it is missing.
        for official in (self.instances, self.official):
            official.place.find(root)
        return _ClassesAndInstances(self, root)

    def image_file(self, identity: str) -> str:
        return f"{identity}.jpg"


class _ClassesAndInstances(PanopticLabels):
    """Official semantic and instance label files.

    Args:
        preparation: preparation that knows the files.
        root: root folder of all data sets.
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
    """Read an official instance file: red is the class of a thing (1-based), green the instance number in the image.

    Returns:
        (H, W) uint8, the instance number of each pixel, 0 for none; and (256,), the ADE20K class of each instance.

    Raises:
        ValueError: the file cannot be read or is not RGB, or an instance has several classes or an invalid one.
    """
    mode, pixels = read_pixels(path)
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"the label image {path} must be RGB (class and instance number), its mode is {mode}")
    kinds, numbers = pixels[..., 0], pixels[..., 1]
    pairs = np.bincount((numbers.astype(np.int32) * 256 + kinds).ravel(), minlength=256 * 256).reshape(256, 256) > 0
    pairs[0] = False
    several = np.flatnonzero(pairs.sum(axis=1) > 1)
    if len(several):
        conflicting = ", ".join(map(str, np.flatnonzero(pairs[several[0]]).tolist()))
        raise ValueError(f"the label file {path} has several classes for the instance {several[0]}: {conflicting}")
    wrong = [value for value in np.flatnonzero(pairs.any(axis=0)).tolist() if not 1 <= value <= len(_THINGS)]
    if wrong:
        raise ValueError(f"the label file {path} has an instance of class {wrong[0]}, must be in 1..{len(_THINGS)}")
    class_of = np.zeros(256, dtype=np.int32)
    number, kind = np.nonzero(pairs)
    class_of[number] = _THINGS[kind - 1]
    return numbers, class_of


def categories() -> list[dict]:
    """Return the categories in COCO's format."""
    names, things = class_names.ADE20K, set(_THINGS.tolist())
    # Without black, which stands for no class.
    colors = voc_colors(len(names) + 1)[1:].tolist()
    return [
        {"id": number, "name": name, "isthing": int(number in things), "color": color}
        for number, (name, color) in enumerate(zip(names, colors))
    ]
