"""Connected regions of a label map, with run-length encoded masks and exact polygons."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

# Pixels that touch at a corner are connected, so that thin lines are not torn.
_CONNECTIVITY = 8


@dataclass(frozen=True, eq=False)
class Region:
    """A connected region of one class; pixels that touch at a corner are connected.

    Attributes:
        number: index of the class.
        name: name of the class, or "class NUMBER" if it has none.
        box: (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive.
        area: number of pixels.
        score: mean score of the class over the region, in -1..1; None if there are no scores.
    """

    number: int
    name: str
    box: tuple[int, int, int, int]
    area: int
    score: float | None
    _components: np.ndarray = field(repr=False)
    _component: int = field(repr=False)

    @property
    def mask(self) -> np.ndarray:
        """Mask (y1 - y0, x1 - x0) bool of the region in its box."""
        x0, y0, x1, y1 = self.box
        return self._components[y0:y1, x0:x1] == self._component

    def rle(self) -> dict:
        """Encode the mask in the image as compressed RLE of pycocotools, with text, so that it can be written as JSON.

        Returns:
            {"size": [H, W], "counts": text}.
        """
        from pycocotools import mask as coco

        height, width = self._components.shape
        runs: Any = {"size": [height, width], "counts": self._counts()}
        encoded = coco.frPyObjects(runs, height, width)
        return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}

    def _counts(self) -> list[int]:
        """Return lengths of runs outside and inside the region, alternating, column by column."""
        height, width = self._components.shape
        x0, y0, _, _ = self.box
        # (columns, rows) with a margin, so that no run crosses a column.
        edges = np.diff(np.pad(self.mask.T, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        starts, ends = (np.ravel_multi_index(np.nonzero(edges == step), (width, height + 1)) for step in (1, -1))
        starts, ends = (places - places // (height + 1) + y0 + x0 * height for places in (starts, ends))
        # In regions as high as the image, a run continues in the next column.
        apart = starts[1:] != ends[:-1]
        starts, ends = starts[np.r_[True, apart]], ends[np.r_[apart, True]]
        counts = np.diff(np.c_[starts, ends].ravel(), prepend=0, append=height * width).tolist()
        return counts if counts[-1] else counts[:-1]

    def rings(self, tolerance: float = 0.0) -> list[np.ndarray]:
        """Trace the outline along the edges of pixels.

        Args:
            tolerance: largest distance in pixels of a simplified outline to the exact one; 0 for the exact one.

        Returns:
            Closed polygons (n, 2) float64 of points (x, y), where a pixel covers x..x + 1 and y..y + 1: the outer ring,
            then the holes. Exact rings may touch themselves at corners. A hole that vanishes when simplified is left
            out.

        Raises:
            ValueError: ``tolerance`` is negative.
        """
        if not _is_number(tolerance) or not 0 <= tolerance < np.inf:
            raise ValueError(f"tolerance must be a number of at least 0 pixels, got {tolerance!r}")
        # With two samples per pixel, the outermost samples lie beside the edges, and round to them.
        samples = np.repeat(np.repeat(self.mask.view(np.uint8), 2, 0), 2, 1)
        contours, hierarchy = cv2.findContours(samples, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        order = np.argsort(hierarchy[0, :, 3] >= 0, kind="stable")
        exact = [_corners((contours[index][:, 0] + 1) // 2) for index in order]
        rings = [_simplified(ring, tolerance) if tolerance else ring for ring in exact]
        rings[0] = rings[0] if len(rings[0]) > 2 else exact[0]
        return [ring + np.array(self.box[:2], dtype=np.float64) for ring in rings if len(ring) > 2]


def shown_names(names: Sequence[str]) -> list[str]:
    """Return the names of all classes, with "class NUMBER" for a class without a name."""
    return [name or f"class {number}" for number, name in enumerate(names)]


def find_regions(
    labels: np.ndarray, names: Sequence[str], min_area: int = 0, scores: Callable[[int], np.ndarray] | None = None
) -> list[Region]:
    """Find the connected regions of all classes.

    Memory is bounded by a few maps of the size of the image, whatever the number of regions and classes.

    Args:
        labels: (H, W) class indices.
        names: names of all classes.
        min_area: smallest area of a region in pixels; smaller ones are left out.
        scores: function that returns the scores (H, W) of a class.

    Returns:
        Regions, largest first.

    Raises:
        ValueError: ``min_area`` is not a number, or negative.
    """
    if not _is_number(min_area) or not min_area >= 0:
        raise ValueError(f"min_area must be at least 0 pixels, got {min_area!r}")
    components, count, regions = np.zeros(labels.shape, dtype=np.int32), 0, []
    shown = shown_names(names)
    present = np.flatnonzero(np.bincount(labels.ravel())).tolist()
    # Several times faster to compare than int64.
    small = labels.astype(np.min_scalar_type(len(names)))
    for number in present:
        inside = small == number
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        y0, x0 = int(rows[0]), int(columns[0])
        window = slice(y0, int(rows[-1]) + 1), slice(x0, int(columns[-1]) + 1)
        crop = np.ascontiguousarray(inside[window]).view(np.uint8)
        found, parts, boxes, _ = cv2.connectedComponentsWithStats(crop, connectivity=_CONNECTIVITY)
        means: list[float | None] = [None] * found
        if scores is not None:
            sums = np.bincount(parts.ravel(), weights=scores(number)[window].ravel(), minlength=found)
            means = (sums / boxes[:, cv2.CC_STAT_AREA].clip(1)).tolist()
        np.add(parts, count, out=components[window], where=inside[window])
        for part in np.flatnonzero(boxes[:, cv2.CC_STAT_AREA] >= min_area).tolist():
            if part:  # 0 is the rest of the window
                left, top, width, height, area = boxes[part].tolist()
                box = (x0 + left, y0 + top, x0 + left + width, y0 + top + height)
                regions.append(Region(number, shown[number], box, area, means[part], components, count + part))
        count += found - 1
    return sorted(regions, key=lambda region: -region.area)


def outermost_first(regions: Iterable[Region]) -> list[Region]:
    """Sort regions so that those inside the hole of another follow it, for programs whose polygons have no holes."""
    return sorted(regions, key=lambda region: -(region.box[2] - region.box[0]) * (region.box[3] - region.box[1]))


def _corners(ring: np.ndarray) -> np.ndarray:
    """Remove repeated points of a closed ring (n, 2), and points between two others on a straight line."""
    ring = ring[(ring != np.roll(ring, 1, 0)).any(1)]
    before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]].astype(np.float64)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    return cv2.approxPolyDP(ring.astype(np.float32), tolerance, True)[:, 0].astype(np.float64)
