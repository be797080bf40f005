"""Maps of segments' ids: as the colors of a picture in COCO's panoptic form, by runs, and as places in a list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A picture has one color for each: id = R + 256 G + 65536 B.
IDS = 256**3


def as_colors(ids: np.ndarray) -> np.ndarray:
    """Ids of segments as colors.

    Args:
        ids: (H, W) integers, 0 to ``IDS`` - 1.

    Returns:
        (H, W, 3) uint8, with id = R + 256 G + 65536 B.
    """
    colors = np.ascontiguousarray(ids, "<u4").view(np.uint8).reshape(*ids.shape, 4)
    return np.ascontiguousarray(colors[..., :3])


def runs(*maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where stretches of pixels begin that are the same in all (H, W) maps, in raster order, and their lengths.

    Neighbours are mostly of one segment, so that working on runs is several times faster than on pixels.
    """
    flat = [ids.ravel() for ids in maps]
    if not flat[0].size:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    changes = flat[0][1:] != flat[0][:-1]
    for ids in flat[1:]:
        changes |= ids[1:] != ids[:-1]
    first = np.concatenate(([0], np.flatnonzero(changes) + 1))
    return first, np.diff(first, append=flat[0].size)


def places(values: np.ndarray, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which segment each id is.

    Args:
        values: (n,) ids; 0 is none.
        ids: of the segments, each once.

    Returns:
        (n,) the place of each value in ``ids``, from 1 on, 0 for none; and the values that are not among them.
    """
    known = np.array([0, *ids], dtype=np.int64)
    values = values.astype(np.int64)
    order = np.argsort(known)
    found = order[np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)]
    return found, values[known[found] != values]


def boxes(places: np.ndarray, count: int) -> np.ndarray:
    """Boxes around segments.

    Args:
        places: (H, W) numbers that are not negative.
        count: the highest number that matters.

    Returns:
        (``count`` + 1 or more, 4) left, top, right and bottom of every number; right is 0 where it is not seen.
    """
    height, width = places.shape
    first = np.ones(places.shape, dtype=bool)
    np.not_equal(places[:, 1:], places[:, :-1], out=first[:, 1:])
    ys, left = np.nonzero(first)
    # A run ends where the next one begins, or with its row.
    right = np.append(left[1:], 0)
    right[right == 0] = width
    owner = places[ys, left]
    found = np.tile([width, height, 0, 0], (max(count, int(owner.max())) + 1, 1))
    np.minimum.at(found[:, 0], owner, left)
    np.minimum.at(found[:, 1], owner, ys)
    np.maximum.at(found[:, 2], owner, right)
    np.maximum.at(found[:, 3], owner, ys + 1)
    return found
