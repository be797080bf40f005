"""Segmentation of an image."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from spar_d2.data.image_arguments import ImageLike, read_image
from spar_d2.results.coco import coco_annotations, coco_categories, coco_image
from spar_d2.results.detections import supervision_detections
from spar_d2.results.geotiff import write_geotiff
from spar_d2.results.labelme import labelme_content
from spar_d2.results.labelstudio import labelstudio_task
from spar_d2.results.regions import Region, find_regions
from spar_d2.visualization import class_colors

if TYPE_CHECKING:
    import supervision

# Longest side in pixels of a picture in a notebook.
_NOTEBOOK_SIDE = 1024


@dataclass(frozen=True)
class Segmentation:
    """Segmentation result of one image.

    Attributes:
        labels: (H, W) int64, indices into ``names``.
        names: names of all classes.
        areas: fraction of the image (0..1) of each class found in it, by class name.
        scores: (classes, h, w) float32 on the grid of patches, or None if they were not requested. The score of a class
            is the largest cosine similarity of its synonyms, in -1..1, before any refinement; -1 for a class that is
            never predicted. Patches cover the image from the top left, and usually a margin at the right and bottom.
        patch_size: side of a patch in pixels; 0 without scores.
        image: the segmented image, (H, W, 3) uint8 RGB; None if unknown.
    """

    labels: np.ndarray
    names: list[str]
    areas: dict[str, float]
    scores: np.ndarray | None = None
    patch_size: int = 0
    image: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        labels: np.ndarray,
        names: Sequence[str],
        scores: np.ndarray | None = None,
        patch_size: int = 0,
        image: np.ndarray | None = None,
    ) -> Segmentation:
        """Create a segmentation from its labels, and compute the areas. Arguments are those of the class."""
        areas = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
        found = {name: float(area) for name, area in zip(names, areas) if area > 0}
        return cls(labels, list(names), found, scores, patch_size, image)

    def draw(self, image: ImageLike | None = None) -> np.ndarray:
        """Draw the segmentation over the image, with class labels and a legend. Requires Detectron2.

        Args:
            image: the segmented image, in any form that :func:`spar_d2.segment` accepts. Default: :attr:`image`.

        Returns:
            (H', W', 3) uint8 RGB image.

        Raises:
            ValueError: the image has a different size, cannot be read, or is not known.
            FileNotFoundError: the image file does not exist.
        """
        from spar_d2.visualization.overlay import draw_overlay

        image = self.image if image is None else image
        if image is None:
            raise ValueError("image must be the segmented image, because this result does not keep it; got None")
        return draw_overlay(read_image(image), self.labels, self.names, class_colors(self.names))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.labels.shape[0], self.labels.shape[1]

    def regions(self, min_area: int = 0) -> list[Region]:
        """Find the connected regions of all classes; pixels that touch at a corner are connected.

        Args:
            min_area: smallest area of a region in pixels; smaller ones are left out.

        Returns:
            Regions, largest first. They have the mean score of their class if there are :attr:`scores`.

        Raises:
            ValueError: ``min_area`` is negative.
        """
        return find_regions(self.labels, self.names, min_area, None if self.scores is None else self._pixel_scores)

    def _pixel_scores(self, number: int) -> np.ndarray:
        """Upsample the scores of a class to (H, W) float32."""
        assert self.scores is not None
        (rows, columns), (height, width) = self.scores[number].shape, self.size
        covered = (columns * self.patch_size, rows * self.patch_size)
        return cv2.resize(self.scores[number], covered, interpolation=cv2.INTER_LINEAR)[:height, :width]

    def to_coco(self, file_name: str = "", image_id: int = 1, min_area: int = 0) -> dict:
        """Convert to the content of a COCO JSON file with one image.

        Args:
            file_name: name of the image in the file.
            image_id: number of the image.
            min_area: see :meth:`regions`.

        Returns:
            {"images", "annotations", "categories"}, with an annotation for each region, whose mask is a compressed RLE.
            Category k + 1 is class k.
        """
        return {
            "images": [coco_image(image_id, file_name, self.size)],
            "annotations": coco_annotations(self.regions(min_area), image_id),
            "categories": coco_categories(self.names),
        }

    def to_labelme(self, file_name: str, min_area: int = 0, tolerance: float = 1.0) -> dict:
        """Convert to the content of a labelme JSON file: a polygon for each region.

        Args:
            file_name: path of the image, relative to the JSON file.
            min_area: see :meth:`regions`.
            tolerance: largest distance in pixels of a polygon to the outline; 0 for the exact one along pixel edges.

        Returns:
            The content. Holes are not cut out: the regions in a hole follow the region around it.
        """
        return labelme_content(self.regions(min_area), file_name, self.size, tolerance)

    def to_labelstudio(self, image: str, kind: str = "brush", min_area: int = 0, tolerance: float = 1.0) -> dict:
        """Convert to a task of Label Studio with a prediction. A list of tasks is the content of an import file.

        Args:
            image: address of the image as Label Studio sees it, such as "/data/local-files/?d=photos/a.jpg".
            kind: "brush" for exact masks, or "polygon" for outer polygons, as in :meth:`to_labelme`.
            min_area, tolerance: see :meth:`to_labelme`.

        Raises:
            ValueError: the kind is unknown.
        """
        return labelstudio_task(self.regions(min_area), image, self.size, kind, tolerance)

    def to_supervision(self, min_area: int = 0) -> supervision.Detections:
        """Convert to detections of supervision: one for each region, with masks of the size of the image.

        All masks together take regions x H x W bytes; leave out small regions with ``min_area``.

        Raises:
            RuntimeError: supervision is not installed.
        """
        return supervision_detections(self.regions(min_area), self.size)

    def to_geotiff(self, source: str | os.PathLike, path: str | os.PathLike) -> None:
        """Write the labels of a georeferenced raster ``source``, see :func:`spar_d2.results.geotiff.write_geotiff`."""
        write_geotiff(self.labels, self.names, source, path)

    def _repr_png_(self) -> bytes | None:
        """Return the picture of :meth:`draw` for notebooks; None without an image or Detectron2."""
        if self.image is None:
            return None
        try:
            picture = Image.fromarray(self.draw())
        except ImportError:
            return None
        picture.thumbnail((_NOTEBOOK_SIDE, _NOTEBOOK_SIDE))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()
