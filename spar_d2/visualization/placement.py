"""Places labels: one per class, well inside one of its regions, without overlaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

# Regions are computed at about this number of pixels, which is precise enough for labels.
_MAX_PIXELS = 500_000
_REGIONS_PER_CLASS = 4
_MAX_REGIONS = 300
# Minimum gap between labels, as a fraction of their height.
_GAP = 0.2
# Offsets from the deepest point to try, in label heights.
_SHIFTS = sorted(((x, y) for x in range(-6, 7, 2) for y in range(-5, 6)), key=lambda s: (math.hypot(*s), s))


@dataclass(frozen=True)
class Region:
    """A connected region of a class.

    Attributes:
        number: index of the class.
        x, y: deepest point in pixels, which is farthest from the region's edge.
        depth: distance from that point to the edge.
        area: area in pixels.
    """

    number: int
    x: float
    y: float
    depth: float
    area: float


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def overlaps(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def find_regions(labels: np.ndarray, smallest: float = 0.0) -> list[Region]:
    """Find the largest regions of every class.

    Args:
        labels: (H, W) class indices.
        smallest: minimum area of a region in pixels.

    Returns:
        Regions, largest first.
    """
    step = max(1, math.isqrt(labels.size // _MAX_PIXELS))
    small = np.ascontiguousarray(labels[::step, ::step])
    # Regions of all classes are separated by removing their edges.
    inside = np.pad(~_edges(small), 1).astype(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5)
    _, regions, boxes, _ = cv2.connectedComponentsWithStats(inside, connectivity=4)
    areas = boxes[1:, cv2.CC_STAT_AREA] * float(step * step)
    largest = 1 + np.argsort(-areas, kind="stable")[:_MAX_REGIONS]
    result, count = [], {}
    for region in largest[areas[largest - 1] >= smallest]:
        left, top, width, height = boxes[region, :4]
        window = (slice(top, top + height), slice(left, left + width))
        y, x, deepest = _middle(np.where(regions[window] == region, depth[window], 0))
        # Undo the offset of the padding.
        y, x = y + top - 1, x + left - 1
        number = int(small[y, x])
        count[number] = count.get(number, 0) + 1
        if count[number] <= _REGIONS_PER_CLASS:
            place = ((x + 0.5) * step, (y + 0.5) * step)
            result.append(Region(number, *place, deepest * step, float(areas[region - 1])))
    return result


def _edges(labels: np.ndarray) -> np.ndarray:
    """Return (H, W) bool: pixels with a different neighbor above, below, left or right."""
    edges = np.zeros(labels.shape, dtype=bool)
    down, across = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edges[1:] |= down
    edges[:-1] |= down
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    return edges


def _middle(depth: np.ndarray) -> tuple[int, int, float]:
    """Return row, column and depth of the deepest point, or the most central one of nearly deepest points."""
    rows, columns = np.nonzero(depth >= 0.9 * depth.max())
    away = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    best = int(away.argmin())
    return int(rows[best]), int(columns[best]), float(depth[rows[best], columns[best]])


def place_labels(
    regions: Sequence[Region], sizes: Mapping[int, tuple[int, int]], picture: tuple[int, int]
) -> dict[int, Box]:
    """Place one label per class.

    Classes with the largest regions come first. A label is placed at the deepest point of the largest region of its
    class, or near that point within the region, or in the next region. Classes without space get no label.

    Args:
        regions: regions of all classes.
        sizes: width and height of the label of each class.
        picture: (H, W) of the image.

    Returns:
        Boxes of the labels by class, within the image and without overlaps.
    """
    boxes: dict[int, Box] = {}
    ordered = sorted(regions, key=lambda region: -region.area)
    for number in dict.fromkeys(region.number for region in ordered if region.number in sizes):
        width, height = sizes[number]
        class_regions = (region for region in ordered if region.number == number and region.area >= width * height)
        candidates = (
            _box(place, width, height, picture) for region in class_regions for place in _centers(region, height)
        )
        free = (
            box for box in candidates if box and not any(_with_gap(box).overlaps(other) for other in boxes.values())
        )
        if box := next(free, None):
            boxes[number] = box
    return boxes


def _centers(region: Region, height: int) -> list[tuple[float, float]]:
    """Return candidate label centers that are inside the region: closer to its deepest point than its depth."""
    shifts = ((x * height, y * height) for x, y in _SHIFTS)
    return [(region.x + x, region.y + y) for x, y in shifts if math.hypot(x, y) < max(region.depth, 1)]


def _box(center: tuple[float, float], width: int, height: int, picture: tuple[int, int]) -> Box | None:
    """Return a box around a point, shifted into the image; None if it is too large."""
    rows, columns = picture
    if width > columns or height > rows:
        return None
    left = min(max(round(center[0] - width / 2), 0), columns - width)
    top = min(max(round(center[1] - height / 2), 0), rows - height)
    return Box(left, top, left + width, top + height)


def _with_gap(box: Box) -> Box:
    gap = math.ceil(_GAP * (box.bottom - box.top))
    return Box(box.left - gap, box.top - gap, box.right + gap, box.bottom + gap)
