"""Panoptic quality of pairs of id maps by COCO's rules, in numpy alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spar_d2.evaluation.panoptic.scores import PanopticCounts
from spar_d2.utils.id_maps import places, runs

VOID = 0


class TrueSegment(NamedTuple):
    """A segment of the ground truth.

    Attributes:
        id: its number in the map, not 0.
        category: any integer.
        iscrowd: a crowd is neither found nor missed; predictions on it may be forgiven.
        area: pixels, if they are known to be others than those in the map.
    """

    id: int
    category: int
    iscrowd: bool = False
    area: float | None = None


def panoptic_quality(
    prediction: np.ndarray,
    predicted: Mapping[int, int],
    truth: np.ndarray,
    segments: Iterable[tuple],
    categories: Sequence[int],
    image: object = None,
) -> PanopticCounts:
    """Compare the segments of one image with the true ones.

    A predicted and a true segment of one category are a pair where their IoU, in which void pixels of the prediction do
    not count, is above 0.5. A true segment without a partner is a false negative, unless it is a crowd. A predicted one
    is a false positive, unless more than half of it lies on void and a crowd of its category. As in COCO's own code,
    that is the last crowd where a category has several in an image, and a true segment that is in no pixel is a false
    negative.

    Args:
        prediction: (H, W) integers of any kind, the id of each pixel's segment; 0 is void.
        predicted: the category of each segment in it.
        truth: (H, W) integers, the same of the ground truth.
        segments: those of the ground truth: :class:`TrueSegment` or the like, (id, category, iscrowd[, area]).
        categories: all that there are.
        image: what to call the image in errors.

    Raises:
        ValueError: maps that differ in size or do not hold integers; an id that is in a map and not among its segments,
            or, of the prediction, the other way round; an id that is 0 or listed twice; an unknown category; an area
            that cannot be.
    """
    where = "" if image is None else f" of the image {image}"
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    for ids, name in ((prediction, "prediction"), (truth, "ground truth")):
        check_map(ids, name + where)
    if prediction.shape != truth.shape:
        sizes = f"{prediction.shape} and {truth.shape}"
        raise ValueError(f"prediction and ground truth{where} differ in size: {sizes}; predict at the image's own size")
    segments = [TrueSegment(*segment) for segment in segments]
    true_ids, found_ids = [segment.id for segment in segments], list(predicted)
    row_of = {category: row for row, category in enumerate(categories)}
    # Number 0 is void, which has no category; two different numbers for that, so that it is never a pair.
    true_row = _rows((segment.category for segment in segments), row_of, true_ids, "ground truth" + where, -1)
    found_row = _rows(predicted.values(), row_of, found_ids, "prediction" + where, -2)
    crowd = np.array([False, *(bool(segment.iscrowd) for segment in segments)])

    first, pixels = runs(prediction, truth)
    true = _numbers(truth.ravel()[first], true_ids, "ground truth" + where)
    found = _numbers(prediction.ravel()[first], found_ids, "prediction" + where)
    true, found, pixels = _pairs(true, found, pixels, len(true_row), len(found_row), truth.size)

    true_area = np.bincount(true, pixels, len(true_row))
    found_area = np.bincount(found, pixels, len(found_row))
    if not found_area[1:].all():
        absent = [found_ids[number] for number in np.flatnonzero(found_area[1:] == 0)]
        raise ValueError(f"prediction{where}: {_listed(absent)} in the list of segments and in no pixel")
    for number, segment in enumerate(segments, start=1):
        if segment.area is not None:
            true_area[number] = segment.area
    void = np.bincount(found, pixels * (true == 0), len(found_row))

    same = (true_row[true] == found_row[found]) & ~crowd[true]
    true_of, found_of, shared = true[same], found[same], pixels[same]
    union = found_area[found_of] + true_area[true_of] - shared - void[found_of]
    if (union < shared).any():
        wrong = [segments[number - 1] for number in true_of[union < shared]]
        raise ValueError(
            f"ground truth{where}: the segment {wrong[0].id} has more pixels than its area {wrong[0].area} says"
        )
    iou = shared / union
    pair = iou > 0.5
    true_of, found_of, iou = true_of[pair], found_of[pair], iou[pair]

    missed = ~crowd
    missed[true_of] = False
    # Where there are several, the last one stays. Two places more, for the row of void counts from the end.
    crowd_of = np.full(len(categories) + 2, -1)
    crowd_of[true_row[crowd]] = np.flatnonzero(crowd)
    forgiven = void + np.bincount(found, pixels * (crowd_of[found_row[found]] == true), len(found_row))
    extra = forgiven <= found_area / 2
    extra[found_of] = False
    missed[0] = extra[0] = False

    rows, count = found_row[found_of], len(categories)
    columns = (
        np.bincount(rows, iou, count),
        np.bincount(rows, minlength=count),
        np.bincount(found_row[extra], minlength=count),
        np.bincount(true_row[missed], minlength=count),
    )
    return PanopticCounts(tuple(categories), np.stack(columns, axis=1).astype(np.float64))


def check_map(ids: np.ndarray, name: str) -> None:
    """Raise ``ValueError`` if this is no (H, W) map of integers."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be (H, W) integers, got {ids.shape} {ids.dtype}")


def segment_ids(ids: np.ndarray) -> np.ndarray:
    """The different ids in an (H, W) map, sorted, void included; faster than ``np.unique`` where regions are large."""
    return np.unique(ids.ravel()[runs(ids)[0]])


def _rows(categories: Iterable[int], row_of: dict, ids: list[int], name: str, void: int) -> np.ndarray:
    """(n + 1,) which category each segment has; the first is void."""
    if VOID in ids:
        raise ValueError(f"{name}: a segment has the id {VOID}, which stands for void")
    if len(set(ids)) < len(ids):
        twice = sorted({number for number in ids if ids.count(number) > 1})
        raise ValueError(f"{name}: {_listed(twice)} listed more than once")
    rows = [void]
    for number, category in zip(ids, categories):
        if category not in row_of:
            raise ValueError(f"{name}: the segment {number} has the category {category!r}, which is not known")
        rows.append(row_of[category])
    return np.array(rows)


def _numbers(values: np.ndarray, ids: list[int], name: str) -> np.ndarray:
    """Which segment each id is: its place in the list, from 1; 0 for void."""
    numbers, stray = places(values, ids)
    if stray.size:
        raise ValueError(f"{name}: {_listed(np.unique(stray).tolist())} in the map and not in the list of segments")
    return numbers


def _pairs(true: np.ndarray, found: np.ndarray, pixels: np.ndarray, trues: int, founds: int, most: int) -> tuple:
    """Every pair of numbers that is in any pixel, and its pixels, as three arrays."""
    keys = true * founds + found
    if trues * founds <= most:
        counts = np.bincount(keys, pixels, trues * founds)
        keys = np.flatnonzero(counts)
        counts = counts[keys]
    else:  # a table of all would be larger than the maps
        keys, inverse = np.unique(keys, return_inverse=True)
        counts = np.bincount(inverse, pixels, len(keys))
    return *np.divmod(keys, founds), counts


def _listed(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    return f"the id {shown} is" if len(ids) == 1 else f"the ids {shown} are"
