"""Outputs equal plain computations at full resolution with loops; their memory is bounded."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks

from live_memory import LiveMemory
from spar_d2.modeling import banded_upsampling
from spar_d2.modeling.mask_transformer import readout
from spar_d2.modeling.mask_transformer.readout import Queries

SIZES = [(24, 40), (23, 37), (1, 1), (50, 3)]


def random_queries(count=9, classes=6, things=3, size=(24, 40), cells=(6, 10), seed=0, covered=None) -> Queries:
    """Smooth masks, so that segments are larger than pixels."""
    generator = torch.Generator().manual_seed(seed)
    masks = 6 * torch.randn(count, *cells, generator=generator)
    probabilities = (2 * torch.randn(count, classes + 1, generator=generator)).softmax(1)
    return Queries(probabilities, masks, covered or (float(size[0]), float(size[1])), size, things)


def full_masks(queries: Queries) -> torch.Tensor:
    """Probabilities (Q, H, W) at full resolution, which cells of the covered area are interpolated to."""
    (height, width), cells = queries.size, queries.masks.shape[1:]
    result = torch.empty(len(queries.masks), height, width)
    for y, x in itertools.product(range(height), range(width)):
        places = []
        for place, side, covered in ((y, cells[0], queries.covered[0]), (x, cells[1], queries.covered[1])):
            position = min(max((place + 0.5) * side / covered - 0.5, 0), side - 1)
            low = int(position)
            places.append((low, min(low + 1, side - 1), position - low))
        (top, bottom, down), (left, right, across) = places
        upper = queries.masks[:, top, left] * (1 - across) + queries.masks[:, top, right] * across
        lower = queries.masks[:, bottom, left] * (1 - across) + queries.masks[:, bottom, right] * across
        result[:, y, x] = (upper * (1 - down) + lower * down).sigmoid()
    return result


def without_duplicates(queries: Queries, kept: list[tuple], threshold: float) -> list[tuple]:
    """Leave out queries whose mask is nearly that of one with a larger score, or of one before it with the same."""
    inside = queries.masks > 0
    result = []
    for at, (query, number, score) in enumerate(kept):
        for other_at, (other, _, other_score) in enumerate(kept):
            union = int((inside[query] | inside[other]).sum())
            is_better = other_score > score or (other_score == score and other_at < at)
            if is_better and union and int((inside[query] & inside[other]).sum()) / union > threshold:
                break
        else:
            result.append((query, number, score))
    return result


def plain_panoptic(
    queries: Queries, object_threshold: float, overlap_threshold: float, duplicate_threshold: float = 1.0
):
    """As MaskFormer's inference code, pixel by pixel."""
    masks, nothing = full_masks(queries).numpy(), queries.probabilities.shape[1] - 1
    kept = []
    for query, row in enumerate(queries.probabilities.tolist()):
        number = int(np.argmax(row))
        if number != nothing and row[number] >= object_threshold:
            kept.append((query, number, row[number]))
    kept = without_duplicates(queries, kept, duplicate_threshold)
    owners = np.full(queries.size, -1)
    for y, x in itertools.product(*map(range, queries.size)):
        best = max(kept, key=lambda entry: entry[2] * masks[entry[0], y, x], default=None)
        if best is not None and masks[best[0], y, x] >= 0.5:
            owners[y, x] = best[0]
    ids, segments, stuff = np.zeros(queries.size, dtype=int), [], {}
    for query, number, score in kept:
        own = owners == query
        if not own.any() or own.sum() / int((masks[query] >= 0.5).sum()) < overlap_threshold:
            continue
        isthing = number < queries.things
        if isthing or number not in stuff:
            category = number if isthing else number - queries.things + 1
            segments.append({"id": len(segments) + 1, "isthing": isthing, "category_id": category})
            segments[-1] |= {"score": score, "area": 0}
        segment = segments[-1] if isthing else stuff.setdefault(number, segments[-1])
        ids[own] = segment["id"]
        segment["area"] += int(own.sum())
        segment["score"] = max(score, segment["score"])
    return ids, segments


@pytest.fixture(params=[None, 400], ids=["one band", "many bands"])
def bands(request, monkeypatch):
    """Bands of a few pixels, even less than a row."""
    if request.param:
        monkeypatch.setitem(banded_upsampling._BAND_BYTES, "cpu", request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "thresholds", [(0.0, 0.0), (0.3, 0.5), (0.3, 0.8), (0.5, 1.0), (0.0, 0.3, 0.3), (0.2, 0.0, 0.0)]
)
def test_panoptic_equals_a_plain_one(bands, size, thresholds):
    shown = 0
    for seed in range(4):
        covered = (size[0] * 1.1, size[1] + 0.7) if seed % 2 else None
        queries = random_queries(size=size, seed=seed, covered=covered)
        ids, segments = queries.panoptic(*thresholds)
        expected_ids, expected = plain_panoptic(queries, *thresholds)
        assert ids.dtype == torch.int32 and np.array_equal(ids.numpy(), expected_ids)
        assert [set(segment) for segment in segments] == [{"id", "isthing", "category_id", "score", "area"}] * len(
            segments
        )
        for found, wanted in zip(segments, expected, strict=True):
            assert found["score"] == pytest.approx(wanted["score"])
            assert {**found, "score": 0} == {**wanted, "score": 0}
        shown += len(segments)
    assert shown or thresholds[1] == 1.0


@pytest.mark.parametrize("cells", [None, 7])
def test_two_queries_on_one_thing_give_one_segment(cells, monkeypatch):
    """Without the threshold, they would share its pixels, and none of them would keep enough of its mask."""
    if cells:
        monkeypatch.setattr(readout, "_CELLS", cells)
    probabilities = torch.tensor([[0.9, 0.0, 0.1], [0.9, 0.0, 0.1], [0.0, 0.8, 0.2]])
    masks = torch.full((3, 8, 8), -9.0)
    masks[:2, 2:6, 2:6] = torch.tensor([5.0, 6.0, 5.0, 6.0])
    masks[1, 2:6, 2:6] = torch.tensor([6.0, 5.0, 6.0, 5.0])
    masks[2, :, 6:] = 9.0
    queries = Queries(probabilities, masks, (8.0, 8.0), (8, 8), 1)
    ids, segments = queries.panoptic(0.5, 0.8)
    assert [segment["isthing"] for segment in segments] == [False]
    ids, segments = queries.panoptic(0.5, 0.8, 0.7)
    assert [(segment["isthing"], segment["area"]) for segment in segments] == [(True, 16), (False, 16)]
    assert (ids[2:6, 2:6] == 1).all() and (ids[:, 6:] == 2).all()


def boxes_of_queries(boxes, numbers, classes=5, things=2, size=(8, 12), sure=0.9) -> Queries:
    """A query with a rectangle for each box; the class number ``classes`` is no object."""
    masks = torch.full((len(boxes), *size), -9.0)
    for mask, (y0, x0, y1, x1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 9.0
    rest = (1 - sure) / classes
    probabilities = torch.full((len(boxes), classes + 1), rest)
    probabilities[range(len(boxes)), numbers] = sure
    return Queries(probabilities, masks, tuple(map(float, size)), size, things)


def test_parts_of_stuff_are_joined_and_things_are_not():
    boxes = [(0, 0, 8, 3), (0, 3, 8, 6), (0, 6, 8, 8), (0, 8, 8, 12)]
    ids, segments = boxes_of_queries(boxes, [3, 1, 3, 1]).panoptic(0.5, 0.5)
    assert [(s["isthing"], s["category_id"], s["area"]) for s in segments] == [
        (False, 2, 40),
        (True, 1, 24),
        (True, 1, 32),
    ]
    assert ids[0].tolist() == [1] * 3 + [2] * 3 + [1] * 2 + [3] * 4
    assert [int((ids == s["id"]).sum()) for s in segments] == [s["area"] for s in segments]


def test_a_query_that_is_mostly_covered_is_ignored():
    boxes, numbers = [(0, 0, 8, 10), (0, 0, 8, 8)], [0, 1]
    queries = boxes_of_queries(boxes, numbers)
    queries.probabilities[0] *= 0.5  # the second one wins where both are
    queries.probabilities[0, -1] += 0.4
    ids, segments = queries.panoptic(0.4, 0.3)
    assert [s["category_id"] for s in segments] == [1]
    assert ids[0].tolist() == [1] * 8 + [0] * 4
    ids, segments = queries.panoptic(0.4, 0.2)
    assert [s["area"] for s in segments] == [16, 64]


def test_no_query_above_the_threshold():
    queries = boxes_of_queries([(0, 0, 4, 4), (0, 0, 4, 4)], [5, 0], sure=0.7)
    for thresholds in ((0.8, 0.5), (1.0, 0.0)):
        ids, segments = queries.panoptic(*thresholds)
        assert segments == [] and ids.shape == (8, 12) and ids.dtype == torch.int32 and not ids.any()
    assert len(queries.panoptic(0.7 - 1e-6, 0.5)[1]) == 1
    empty = boxes_of_queries([(0, 0, 0, 0)], [0])
    assert empty.panoptic(0.5, 0.0)[1] == [] and not empty.panoptic(0.5, 0.0)[0].any()


@pytest.mark.slow
def test_a_thousand_queries():
    queries = random_queries(1000, 40, 30, (15, 22), (8, 11))
    ids, segments = queries.panoptic(0.6, 0.0)
    expected_ids, expected = plain_panoptic(queries, 0.6, 0.0)
    assert len(segments) > 10 and [s["area"] for s in segments] == [s["area"] for s in expected]
    assert np.array_equal(ids.numpy(), expected_ids)
    assert torch.equal(queries.labels(), queries.class_scores().argmax(0))
    assert len(queries.instances(100)) == 100


@pytest.mark.parametrize("size", SIZES)
def test_class_scores_and_labels_equal_plain_ones(bands, size):
    queries = random_queries(size=size, covered=(size[0] + 1.5, size[1] * 1.0))
    scores = queries.class_scores()
    expected = torch.einsum("qk,qhw->khw", queries.probabilities[:, :-1], full_masks(queries))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(queries.labels(), scores.argmax(0))


@pytest.mark.parametrize("size", SIZES)
def test_instances_equal_plain_ones(bands, size):
    queries = random_queries(size=size, classes=5, things=4)
    found, masks = queries.instances(7), full_masks(queries)
    pairs = sorted(
        ((float(queries.probabilities[q, k]), q, k) for q in range(9) for k in range(4)), key=lambda pair: -pair[0]
    )
    assert found.image_size == size and len(found) == 7
    for index, (probability, query, number) in enumerate(pairs[:7]):
        inside = masks[query] > 0.5
        assert found.pred_classes[index] == number and torch.equal(found.pred_masks[index], inside)
        mean = masks[query][inside].mean() if inside.any() else 0
        assert found.scores[index] == pytest.approx(float(probability * mean), abs=1e-5)
    assert torch.equal(found.pred_boxes.tensor, BitMasks(found.pred_masks).get_bounding_boxes().tensor)


def test_boxes_and_empty_masks():
    queries = boxes_of_queries([(2, 3, 5, 9), (0, 0, 0, 0), (7, 11, 8, 12), (0, 0, 8, 12)], [0, 1, 0, 1])
    found = queries.instances(4)
    order = {tuple(box): score for box, score in zip(found.pred_boxes.tensor.tolist(), found.scores.tolist())}
    assert set(order) == {(3, 2, 9, 5), (0, 0, 0, 0), (11, 7, 12, 8), (0, 0, 12, 8)}
    assert order[(0, 0, 0, 0)] == 0 and min(score for box, score in order.items() if any(box)) > 0.89
    assert found.pred_masks.dtype == torch.bool and found.pred_boxes.tensor.dtype == torch.float32


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (1, 1), (18, 18), (100, 18)])
def test_the_limit_of_instances(limit, count):
    found = random_queries(things=2).instances(limit)
    assert len(found) == count == len(found.pred_masks) == len(found.scores)
    assert found.pred_masks.shape == (count, 24, 40)


def test_models_without_things_have_no_instances():
    found = random_queries(things=0).instances(100)
    assert len(found) == 0 and found.pred_masks.shape == (0, 24, 40) and found.pred_boxes.tensor.shape == (0, 4)


def peak(call) -> int:
    with LiveMemory() as memory:
        kept = call()
    del kept
    return memory.peak


def test_memory_does_not_grow_with_classes_times_pixels(monkeypatch):
    monkeypatch.setitem(banded_upsampling._BAND_BYTES, "cpu", 1 << 16)
    size, peaks = (150, 200), {}
    for classes in (5, 200):
        queries = random_queries(4, classes, classes // 2, size)
        peaks[classes] = {
            "labels": peak(queries.labels),
            "class_scores": peak(queries.class_scores) - classes * size[0] * size[1] * 4,
            "panoptic": peak(lambda queries=queries: queries.panoptic(0.0, 0.0)),
        }
    for name in peaks[5]:
        # 195 more classes at all pixels are 23 MB.
        assert peaks[200][name] < peaks[5][name] + 400_000, (name, peaks)


@pytest.mark.parametrize("output", ["labels", "panoptic"])
def test_memory_does_not_grow_with_queries_times_pixels(monkeypatch, output):
    monkeypatch.setitem(banded_upsampling._BAND_BYTES, "cpu", 1 << 16)
    arguments, peaks = (0.0, 0.0) if output == "panoptic" else (), []
    for count in (4, 200):
        queries = random_queries(count, 5, 2, (150, 200))
        peaks.append(peak(lambda queries=queries: getattr(queries, output)(*arguments)))
    assert peaks[1] < peaks[0] + 400_000, peaks


def test_masks_of_another_type_are_upsampled_in_float32():
    queries = random_queries()
    half = Queries(queries.probabilities, queries.masks.half(), queries.covered, queries.size, queries.things)
    expected = F.interpolate(half.masks.float()[None], half.size, mode="bilinear")[0].sigmoid()
    scores = torch.einsum("qk,qhw->khw", queries.probabilities[:, :-1], expected)
    torch.testing.assert_close(half.class_scores(), scores, rtol=1e-4, atol=1e-5)
