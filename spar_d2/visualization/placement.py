"""Where labels go: one for a class, deep inside one of its regions, and none over another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

# Regions are looked for in a picture of about this many pixels: a label need not be placed to the pixel.
_PIXELS = 500_000
_REGIONS_PER_CLASS = 4
_MOST_REGIONS = 300
# Labels keep this share of their height between them.
_GAP = 0.2
# Where to look for room about the deepest point, in heights of the label.
_SHIFTS = sorted(((x, y) for x in range(-6, 7, 2) for y in range(-5, 6)), key=lambda s: (math.hypot(*s), s))


@dataclass(frozen=True)
class Region:
    """A connected part of a class.

    Attributes:
        number: of its class.
        x, y: its deepest point, in pixels.
        depth: distance of that point to the region's edge.
        area: in pixels.
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
    """The largest regions of every class.

    Args:
        labels: (H, W) numbers of classes.
        smallest: area in pixels below which a region is left out.

    Returns:
        Largest first.
    """
    step = max(1, math.isqrt(labels.size // _PIXELS))
    small = np.ascontiguousarray(labels[::step, ::step])
    # All classes at once: what lies within their edges falls apart into the regions.
    inside = np.pad(~_edges(small), 1).astype(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5)
    _, regions, boxes, _ = cv2.connectedComponentsWithStats(inside, connectivity=4)
    areas = boxes[1:, cv2.CC_STAT_AREA] * float(step * step)
    largest = 1 + np.argsort(-areas, kind="stable")[:_MOST_REGIONS]
    found, count = [], {}
    for region in largest[areas[largest - 1] >= smallest]:
        left, top, width, height = boxes[region, :4]
        window = (slice(top, top + height), slice(left, left + width))
        y, x, deepest = _middle(np.where(regions[window] == region, depth[window], 0))
        # The padding counts in depth and places.
        y, x = y + top - 1, x + left - 1
        number = int(small[y, x])
        count[number] = count.get(number, 0) + 1
        if count[number] <= _REGIONS_PER_CLASS:
            place = ((x + 0.5) * step, (y + 0.5) * step)
            found.append(Region(number, *place, deepest * step, float(areas[region - 1])))
    return found


def _edges(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels with another label above, below, left or right of them."""
    edges = np.zeros(labels.shape, dtype=bool)
    down, across = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edges[1:] |= down
    edges[:-1] |= down
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    return edges


def _middle(depth: np.ndarray) -> tuple[int, int, float]:
    """Row and column of the deepest point; of many that are nearly as deep, the one in their middle; and its depth."""
    rows, columns = np.nonzero(depth >= 0.9 * depth.max())
    away = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    best = int(away.argmin())
    return int(rows[best]), int(columns[best]), float(depth[rows[best], columns[best]])


def place_labels(
    regions: Sequence[Region], sizes: Mapping[int, tuple[int, int]], picture: tuple[int, int]
) -> dict[int, Box]:
    """Room for one label of every class.

    The classes of the largest regions come first. A label stands about the deepest point of the class's largest region,
    or near it within the region, or in its next region. A class without room has no label.

    Args:
        regions: of all classes.
        sizes: width and height of the label of every class that is to have one.
        picture: (H, W).

    Returns:
        For each class that has room the box of its label, within the picture and free of all others.
    """
    taken: dict[int, Box] = {}
    ordered = sorted(regions, key=lambda region: -region.area)
    for number in dict.fromkeys(region.number for region in ordered if region.number in sizes):
        width, height = sizes[number]
        own = (region for region in ordered if region.number == number and region.area >= width * height)
        candidates = (_box(place, width, height, picture) for region in own for place in _places(region, height))
        free = (box for box in candidates if box and not any(_apart(box).overlaps(other) for other in taken.values()))
        if box := next(free, None):
            taken[number] = box
    return taken


def _places(region: Region, height: int) -> list[tuple[float, float]]:
    """Centres for a label: points of the region, as all that are less than its depth away from its deepest are."""
    shifts = ((x * height, y * height) for x, y in _SHIFTS)
    return [(region.x + x, region.y + y) for x, y in shifts if math.hypot(x, y) < max(region.depth, 1)]


def _box(center: tuple[float, float], width: int, height: int, picture: tuple[int, int]) -> Box | None:
    """A box about a point, moved into the picture; None where it is too large for that."""
    rows, columns = picture
    if width > columns or height > rows:
        return None
    left = min(max(round(center[0] - width / 2), 0), columns - width)
    top = min(max(round(center[1] - height / 2), 0), rows - height)
    return Box(left, top, left + width, top + height)


def _apart(box: Box) -> Box:
    gap = math.ceil(_GAP * (box.bottom - box.top))
    return Box(box.left - gap, box.top - gap, box.right + gap, box.bottom + gap)
