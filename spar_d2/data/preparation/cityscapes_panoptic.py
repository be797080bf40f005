"""Cityscapes' panoptic labels, made from its instances as in Cityscapes' tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spar_d2.data.datasets import class_names
from spar_d2.data.preparation.cityscapes import EVALUATED, GT_FINE, IDS, photos_and_labels
from spar_d2.data.preparation.common import IGNORED, classes_in, label_table, read_values
from spar_d2.data.preparation.panoptic import PanopticLabels, PanopticPreparation, areas_and_boxes

# Values from here on encode instances: value = factor * class + instance number.
_INSTANCES = 1000
# Smallest id of a thing; all larger ids are things, too.
_FIRST_THING = 24
_GROUPS = {7: "flat", 11: "construction", 17: "object", 21: "nature", 23: "sky", 24: "human", 26: "vehicle"}
_COLORS = (
    *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30)),
    *((220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142)),
    *((0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)


class CityscapesPanopticPreparation(PanopticPreparation):
    """Segments of the 19 evaluated classes, with official ids as categories. All other pixels are void.

    The segment id is the official value. Things whose instances are not separated form one crowd segment.

    Args:
        name: name of the data set.
        split: "val" or "train".
    """

    def __init__(self, name: str, split: str) -> None:
        ids = {number: number if number in EVALUATED else IGNORED for number in range(IDS)}
        of_instances = np.repeat(label_table(ids, IDS)[1:], _INSTANCES)
        super().__init__(
            name,
            split,
            "cityscapes" if split == "val" else "cityscapes_train",
            *photos_and_labels(split, "_gtFine_instanceIds.png"),
            np.concatenate([label_table(ids, _INSTANCES), of_instances]),
            f"{GT_FINE}/cityscapes_panoptic_{split}",
            categories(),
        )

    def prepared(self, root: Path, name: str) -> Path:
        return self.folder(root) / f"{Path(name).name}_gtFine_panoptic.png"

    def labels(self, root: Path) -> PanopticLabels:
        self.official.place.find(root)
        return _InstanceIds(lambda name: self.official.file(root, name), self.table)

    def image_file(self, identity: str) -> str:
        # File name that Cityscapes' tools write. The image itself has a shorter name.
        return f"{identity}_gtFine_leftImg8bit.png"


@dataclass(frozen=True)
class _InstanceIds(PanopticLabels):
    """Official instance label files.

    Attributes:
        file: maps an image name to its official file.
        table: category of each official value, see :func:`label_table`.
    """

    file: Callable[[str], Path]
    table: np.ndarray

    def files(self, name: str) -> tuple[Path, ...]:
        return (self.file(name),)

    def segments(self, name: str) -> tuple[np.ndarray, list[dict]]:
        path = self.file(name)
        values = read_values(path)
        void = classes_in(path, values, self.table) == IGNORED
        ids = np.where(void, 0, values)
        segments = []
        for value, place in areas_and_boxes(ids).items():
            category = int(self.table[value])
            crowd = int(value < _INSTANCES and category >= _FIRST_THING)
            segments.append({"id": value, "category_id": category, **place, "iscrowd": crowd})
        return ids, segments


def categories() -> list[dict]:
    """Return the categories in COCO's format."""
    result, group = [], ""
    for number, name, color in zip(EVALUATED, class_names.CITYSCAPES, _COLORS):
        group = _GROUPS.get(number, group)
        thing = int(number >= _FIRST_THING)
        extra = {"supercategory": group, "color": list(color)}
        result.append({"id": number, "name": name, "isthing": thing, **extra})
    return result
