"""Segmentation of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spar_d2.data.image_arguments import ImageLike, read_image


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
        from spar_d2.visualization import class_colors
        from spar_d2.visualization.overlay import draw_overlay

        image = self.image if image is None else image
        if image is None:
            raise ValueError("image must be the segmented image, because this result does not keep it; got None")
        return draw_overlay(read_image(image), self.labels, self.names, class_colors(self.names))
