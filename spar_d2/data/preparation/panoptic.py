"""Panoptic labels in COCO's format: a mask image of the segments of each image, and a JSON file."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from spar_d2.data.preparation.common import Labels
from spar_d2.data.preparation.folders import FilePattern, FolderPreparation
from spar_d2.utils.id_maps import as_colors, boxes
from spar_d2.utils.io import write_text


class PanopticLabels(Labels):
    """Official labels that are converted to segments."""

    @abstractmethod
    def segments(self, name: str) -> tuple[np.ndarray, list[dict]]:
        """Convert the labels of an image to segments.

        Returns:
            (H, W) integers, the segment id of each pixel, 0 (none) to 2**24 - 1; and the segments in COCO's format,
            with id, category_id, area, bbox and iscrowd.

        Raises:
            ValueError: a file is corrupt, or its values do not belong to the data set.
        """

    def convert(self, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        ids, segments = self.segments(name)
        height, width = ids.shape
        return as_colors(ids), {"height": height, "width": width, "segments": segments}


class PanopticPreparation(FolderPreparation):
    """A data set with panoptic labels, in a folder and a JSON file of the same name.

    Args:
        name, split, images_of, photos, official, table: see :class:`FolderPreparation`.
        target: folder of the masks, relative to the root.
        categories: categories in COCO's format.
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
        """Return the file name of an image in the JSON file, given its id."""

    def finish(self, root: Path, entries: dict[str, dict[str, Any]]) -> None:
        images, annotations = [], []
        for name, entry in entries.items():
            identity = Path(name).name
            size = {"width": entry["width"], "height": entry["height"]}
            images.append({"id": identity, "file_name": self.image_file(identity), **size})
            file_name = self.prepared(root, name).name
            annotations.append({"image_id": identity, "file_name": file_name, "segments_info": entry["segments"]})
        content = {"images": images, "annotations": annotations, "categories": self.categories}
        write_text(json.dumps(content), self.index(root))


def areas_and_boxes(values: np.ndarray) -> dict[int, dict[str, Any]]:
    """Compute the area and bounding box of each value except 0.

    Args:
        values: (H, W) non-negative integers. Memory grows with the largest value.

    Returns:
        A dict with "area" in pixels and "bbox" (left, top, width, height) for each value, in ascending order.
    """
    areas = np.bincount(values.ravel())
    areas[:1] = 0
    present = np.flatnonzero(areas)
    index = np.zeros(len(areas), dtype=np.intp)
    index[present] = np.arange(1, len(present) + 1)
    left, top, right, bottom = boxes(index[values], len(present))[1:].T
    bboxes = np.stack([left, top, right - left, bottom - top], axis=1).tolist()
    return {
        value: {"area": area, "bbox": bbox}
        for value, area, bbox in zip(present.tolist(), areas[present].tolist(), bboxes)
    }
