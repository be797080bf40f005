"""Panoptic quality of id maps by COCO's rules. Needs only NumPy."""

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
        id: id in the map, not 0.
        category: category, any integer.
        iscrowd: whether the segment is a crowd, which is neither a true positive nor a false negative. Predictions that
            lie mostly on it are not false positives.
        area: number of pixels, if it differs from that in the map.
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
    """Compare predicted and true segments of an image.

    A predicted and a true segment of the same category match if their IoU is above 0.5, where void pixels of the
    prediction are excluded. Unmatched true segments are false negatives, unless they are crowds. Unmatched predicted
    segments are false positives, unless more than half of their area is void or a crowd of their category. As in COCO's
    code, only the last crowd of each category is considered, and true segments without pixels are false negatives.

    Args:
        prediction: (H, W) integers, the segment id of each pixel; 0 is void.
        predicted: category of each predicted segment.
        truth: (H, W) integers, the segment ids of the ground truth.
        segments: segments of the ground truth, :class:`TrueSegment` or (id, category, iscrowd[, area]).
        categories: all categories.
        image: name of the image in error messages.

    Raises:
        ValueError: the maps differ in size or are not integers; an id of a map is not listed, or a predicted segment
            has no pixels; an id is 0 or duplicated; a category is unknown; or an area is too small.
    """
    where = "" if image is None else f" of the image {image}"
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    for ids, name in ((prediction, "prediction"), (truth, "ground truth")):
        check_map(ids, name + where)
    if prediction.shape != truth.shape:
        sizes = f"{prediction.shape} and {truth.shape}"
        raise ValueError(f"prediction and ground truth{where} differ in size: {sizes}; predict at the image's own size")
    segments = [TrueSegment(*segment) for segment in segments]
    true_ids, pred_ids = [segment.id for segment in segments], list(predicted)
    row_of = {category: row for row, category in enumerate(categories)}
    # Index 0 is void. It has no category: different placeholders ensure that void never matches.
    true_row = _rows((segment.category for segment in segments), row_of, true_ids, "ground truth" + where, -1)
    pred_row = _rows(predicted.values(), row_of, pred_ids, "prediction" + where, -2)
    crowd = np.array([False, *(bool(segment.iscrowd) for segment in segments)])

    first, pixels = runs(prediction, truth)
    true = _segment_indices(truth.ravel()[first], true_ids, "ground truth" + where)
    pred = _segment_indices(prediction.ravel()[first], pred_ids, "prediction" + where)
    true, pred, pixels = _pairs(true, pred, pixels, len(true_row), len(pred_row), truth.size)

    true_area = np.bincount(true, pixels, len(true_row))
    pred_area = np.bincount(pred, pixels, len(pred_row))
    if not pred_area[1:].all():
        absent = [pred_ids[number] for number in np.flatnonzero(pred_area[1:] == 0)]
        raise ValueError(f"prediction{where}: {_listed(absent)} in the list of segments, but not in the map")
    for number, segment in enumerate(segments, start=1):
        if segment.area is not None:
            true_area[number] = segment.area
    void = np.bincount(pred, pixels * (true == 0), len(pred_row))

    same = (true_row[true] == pred_row[pred]) & ~crowd[true]
    true_of, pred_of, shared = true[same], pred[same], pixels[same]
    union = pred_area[pred_of] + true_area[true_of] - shared - void[pred_of]
    if (union < shared).any():
        wrong = [segments[number - 1] for number in true_of[union < shared]]
        raise ValueError(
            f"ground truth{where}: the segment {wrong[0].id} has more pixels than its area {wrong[0].area}"
        )
    iou = shared / union
    pair = iou > 0.5
    true_of, pred_of, iou = true_of[pair], pred_of[pair], iou[pair]

    missed = ~crowd
    missed[true_of] = False
    # The last crowd of a category wins. Two extra elements, because void rows index from the end.
    crowd_of = np.full(len(categories) + 2, -1)
    crowd_of[true_row[crowd]] = np.flatnonzero(crowd)
    forgiven = void + np.bincount(pred, pixels * (crowd_of[pred_row[pred]] == true), len(pred_row))
    extra = forgiven <= pred_area / 2
    extra[pred_of] = False
    missed[0] = extra[0] = False

    rows, count = pred_row[pred_of], len(categories)
    columns = (
        np.bincount(rows, iou, count),
        np.bincount(rows, minlength=count),
        np.bincount(pred_row[extra], minlength=count),
        np.bincount(true_row[missed], minlength=count),
    )
    return PanopticCounts(tuple(categories), np.stack(columns, axis=1).astype(np.float64))


def check_map(ids: np.ndarray, name: str) -> None:
    """Raise ``ValueError`` if ids are not (H, W) integers."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be (H, W) integers, got {ids.shape} {ids.dtype}")


def segment_ids(ids: np.ndarray) -> np.ndarray:
    """Return the sorted unique ids of a map (H, W), including void. Faster than ``np.unique`` for large regions."""
    return np.unique(ids.ravel()[runs(ids)[0]])


def _rows(categories: Iterable[int], row_of: dict, ids: list[int], name: str, void: int) -> np.ndarray:
    """Return the category index (n + 1,) of each segment; the first element is void."""
    if VOID in ids:
        raise ValueError(f"{name}: a segment has the id {VOID}, which stands for void")
    if len(set(ids)) < len(ids):
        duplicates = sorted({number for number in ids if ids.count(number) > 1})
        raise ValueError(f"{name}: {_listed(duplicates)} listed more than once")
    rows = [void]
    for number, category in zip(ids, categories):
        if category not in row_of:
            raise ValueError(f"{name}: the segment {number} has the unknown category {category!r}")
        rows.append(row_of[category])
    return np.array(rows)


def _segment_indices(values: np.ndarray, ids: list[int], name: str) -> np.ndarray:
    """Map ids to 1-based indices in the list of segments; 0 is void."""
    numbers, unlisted = places(values, ids)
    if unlisted.size:
        raise ValueError(f"{name}: {_listed(np.unique(unlisted).tolist())} in the map, but not in the list of segments")
    return numbers


def _pairs(
    true: np.ndarray, pred: np.ndarray, pixels: np.ndarray, num_true: int, num_pred: int, max_table: int
) -> tuple:
    """Return all pairs of indices that share pixels, and their numbers of pixels, as three arrays."""
    keys = true * num_pred + pred
    if num_true * num_pred <= max_table:
        counts = np.bincount(keys, pixels, num_true * num_pred)
        keys = np.flatnonzero(counts)
        counts = counts[keys]
    else:  # a dense table would be larger than the maps
        keys, inverse = np.unique(keys, return_inverse=True)
        counts = np.bincount(inverse, pixels, len(keys))
    return *np.divmod(keys, num_pred), counts


def _listed(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    return f"the id {shown} is" if len(ids) == 1 else f"the ids {shown} are"
