"""Panoptic labels as COCO keeps them: a picture of the segments of each image, and one JSON file about all of them."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from spar_d2.data.preparation.common import Labels
from spar_d2.data.preparation.folders import FilePattern, FolderPreparation
from spar_d2.utils.id_maps import as_colors, boxes
from spar_d2.utils.io import atomic_write


class PanopticLabels(Labels):
    """Official labels that become segments."""

    @abstractmethod
    def segments(self, name: str) -> tuple[np.ndarray, list[dict]]:
        """The segments of an image, given the image's name.

        Returns:
            (H, W) integers, the id of each pixel's segment, 0 (none) to 2**24 - 1; and for each segment in COCO's form
            id, category_id, area, bbox, iscrowd.

        Raises:
            ValueError: a file is damaged, or has other values than the data set.
        """

    def convert(self, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        ids, segments = self.segments(name)
        height, width = ids.shape
        return as_colors(ids), {"height": height, "width": width, "segments": segments}


class PanopticPreparation(FolderPreparation):
    """A data set whose labels become segments, in a folder and a JSON file beside it with the same name.

    Args:
        name, split, images_of, photos, official, table: see :class:`FolderPreparation`.
        target: that folder, relative to the root.
        categories: its classes in COCO's form.
    """

    def __init__(
        self,
        name: str,
        split: str,
        images_of: str,
        photos: FilePattern,
        official: FilePattern,
        table: np.ndarray,
        target: str,
        categories: list[dict],
    ) -> None:
        super().__init__(name, split, photos, official, table, images_of)
        self.target, self.categories = target, categories

    def folder(self, root: Path) -> Path:
        return root / self.target

    def index(self, root: Path) -> Path:
        return root / f"{self.target}.json"

    @abstractmethod
    def image_file(self, identity: str) -> str:
        """The image's file name in the JSON file, given its id there."""

    def finish(self, root: Path, entries: dict[str, dict[str, Any]]) -> None:
        images, annotations = [], []
        for name, entry in entries.items():
            identity = Path(name).name
            size = {"width": entry["width"], "height": entry["height"]}
            images.append({"id": identity, "file_name": self.image_file(identity), **size})
            file_name = self.prepared(root, name).name
            annotations.append({"image_id": identity, "file_name": file_name, "segments_info": entry["segments"]})
        content = {"images": images, "annotations": annotations, "categories": self.categories}
        with atomic_write(self.index(root)) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


def areas_and_boxes(values: np.ndarray) -> dict[int, dict[str, Any]]:
    """Where each value but 0 is.

    Args:
        values: (H, W) integers that are not negative. Memory grows with the largest.

    Returns:
        By value, in ascending order, "area" in pixels and "bbox", its left, top, width and height.
    """
    areas = np.bincount(values.ravel())
    areas[:1] = 0
    found = np.flatnonzero(areas)
    number = np.zeros(len(areas), dtype=np.intp)
    number[found] = np.arange(1, len(found) + 1)
    left, top, right, bottom = boxes(number[values], len(found))[1:].T
    places = np.stack([left, top, right - left, bottom - top], axis=1).tolist()
    return {
        value: {"area": area, "bbox": place}
        for value, area, place in zip(found.tolist(), areas[found].tolist(), places)
    }
