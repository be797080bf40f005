"""Segment id maps: conversion to COCO panoptic colors, run-length encoding, and index lookup."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Number of ids that RGB colors can encode: id = R + 256 G + 65536 B.
IDS = 256**3


def as_colors(ids: np.ndarray) -> np.ndarray:
    """Encode segment ids as RGB colors.

    Args:
        ids: (H, W) integers in 0..``IDS`` - 1.

    Returns:
        (H, W, 3) uint8 with id = R + 256 G + 65536 B.
    """
    colors = np.ascontiguousarray(ids, "<u4").view(np.uint8).reshape(*ids.shape, 4)
    return np.ascontiguousarray(colors[..., :3])


def runs(*maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run-length encode one or more id maps jointly.

    Adjacent pixels usually belong to the same segment, so processing runs is several times faster than processing
    pixels.

    Args:
        maps: (H, W) arrays of the same size.

    Returns:
        Start indices and lengths of runs of pixels that have constant values in all maps, in row-major order.
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
    """Look up the index of each value in a list of segment ids.

    Args:
        values: (n,) segment ids; 0 means no segment.
        ids: unique segment ids.

    Returns:
        The one-based index of each value in ``ids`` (n,), 0 for no segment; and the values that are not in ``ids``.
    """
    known = np.array([0, *ids], dtype=np.int64)
    values = values.astype(np.int64)
    order = np.argsort(known)
    indices = order[np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)]
    return indices, values[known[indices] != values]


def boxes(places: np.ndarray, count: int) -> np.ndarray:
    """Compute bounding boxes of segments.

    Args:
        places: (H, W) nonnegative segment indices.
        count: largest index of interest.

    Returns:
        Left, top, right and bottom of each index, (at least ``count`` + 1, 4); right is 0 for absent indices.
    """
    height, width = places.shape
    first = np.ones(places.shape, dtype=bool)
    np.not_equal(places[:, 1:], places[:, :-1], out=first[:, 1:])
    ys, left = np.nonzero(first)
    # A run ends at the start of the next one, or at the end of its row.
    right = np.append(left[1:], 0)
    right[right == 0] = width
    index = places[ys, left]
    result = np.tile([width, height, 0, 0], (max(count, int(index.max())) + 1, 1))
    np.minimum.at(result[:, 0], index, left)
    np.minimum.at(result[:, 1], index, ys)
    np.maximum.at(result[:, 2], index, right)
    np.maximum.at(result[:, 3], index, ys + 1)
    return result
