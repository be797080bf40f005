import tracemalloc

import numpy as np
import pytest

from plain import panoptic_counts
from spar_d2.evaluation import panoptic_quality
from spar_d2.evaluation.panoptic.quality import TrueSegment, segment_ids
from spar_d2.evaluation.panoptic.scores import PanopticCounts, score_table

CATEGORIES = (1, 4, 7, 200)
THINGS = {1, 7}


def random_case(rng):
    """Maps that partly agree, with void and crowds, of any kind of integers; ids up to the largest color."""
    shape = rng.integers(1, 16, 2)
    cells = tuple(-(-shape // rng.integers(1, 6)))
    regions = rng.integers(0, rng.integers(1, 9), cells).repeat(5, 0).repeat(5, 1)[: shape[0], : shape[1]]
    true_ids = rng.choice(2**24 - 1, 9, replace=False) + 1
    true_ids[rng.random(9) < 0.2] = 0
    truth = true_ids[regions]
    categories = rng.choice(CATEGORIES, 9)
    crowd = rng.random(9) < 0.3
    numbers = np.flatnonzero(true_ids)
    rng.shuffle(numbers)
    # Some are in no pixel.
    segments = [(int(true_ids[n]), int(categories[n]), bool(crowd[n])) for n in numbers]
    changed = np.where(
        rng.random(regions.shape) < rng.choice([0, 0.1, 0.4]), rng.integers(0, 9, regions.shape), regions
    )
    kind = rng.choice(["uint8", "int16", "int32", "uint32", "int64", "uint64"])
    found_ids = rng.integers(1, min(2**40, np.iinfo(kind).max), 9)
    found_ids[rng.random(9) < 0.15] = 0
    prediction = found_ids[changed]
    guessed = np.where(rng.random(9) < 0.8, categories, rng.choice(CATEGORIES, 9))
    predicted = {int(found_ids[n]): int(guessed[n]) for n in rng.permutation(9) if found_ids[n] in prediction}
    predicted.pop(0, None)
    return prediction.astype(kind), predicted, truth.astype(rng.choice(["uint32", "int32", "int64"])), segments


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_same_counts_as_plain_loops(seed):
    rng = np.random.default_rng(seed)
    total, plain_total = PanopticCounts.zeros(CATEGORIES), np.zeros((4, 4))
    for _ in range(100):
        case = random_case(rng)
        counts, plain = panoptic_quality(*case, CATEGORIES), panoptic_counts(*case, CATEGORIES)
        assert np.allclose(counts.values, list(plain.values()), rtol=0, atol=1e-12)
        total += counts
        plain_total += list(plain.values())
    assert np.allclose(total.values, plain_total, rtol=0, atol=1e-10)
    assert (plain_total[:, 1:] > 0).all()


def one(prediction, truth, segments, predicted=None):
    """Counts [IoUs, TP, FP, FN] of category 1, where predictions are of that unless said otherwise."""
    prediction, truth = np.array([prediction]), np.array([truth])
    predicted = predicted or {number: 1 for number in np.unique(prediction).tolist() if number}
    return panoptic_quality(prediction, predicted, truth, segments, CATEGORIES).values[0].tolist()


@pytest.mark.parametrize(
    ("prediction", "truth", "segments", "expected"),
    [
        pytest.param([5, 5, 5, 0], [9, 9, 9, 9], [(9, 1, 0)], [0.75, 1, 0, 0], id="pair"),
        pytest.param([5, 5, 5, 5], [9, 9, 9, 0], [(9, 1, 0)], [1, 1, 0, 0], id="void is no part of the union"),
        pytest.param([5, 5, 0, 0], [9, 9, 9, 9], [(9, 1, 0)], [0, 0, 1, 1], id="half is no pair"),
        pytest.param([5, 5, 6, 6], [9, 9, 0, 0], [(9, 1, 0)], [1, 1, 0, 0], id="on void"),
        pytest.param([5, 5, 5, 5], [9, 9, 0, 0], [(9, 4, 0)], [0, 0, 1, 0], id="half on void"),
        pytest.param([5, 5, 5, 5], [9, 0, 0, 0], [(9, 4, 0)], [0, 0, 0, 0], id="more than half on void"),
        pytest.param([5, 5, 5, 5], [9, 9, 9, 9], [(9, 1, 1)], [0, 0, 0, 0], id="on its crowd"),
        pytest.param([5, 5, 5, 5], [9, 9, 9, 9], [(9, 4, 1)], [0, 0, 1, 0], id="on another crowd"),
        pytest.param([5, 5, 5, 5], [9, 9, 0, 8], [(9, 1, 1), (8, 4, 0)], [0, 0, 0, 0], id="on void and crowd"),
        pytest.param([5, 5, 5, 5], [9, 9, 9, 8], [(9, 1, 1), (8, 1, 1)], [0, 0, 1, 0], id="the last crowd counts"),
        pytest.param([5, 5, 5, 5], [9, 9, 9, 8], [(8, 1, 1), (9, 1, 1)], [0, 0, 0, 0], id="in the list's order"),
        pytest.param([0, 0, 0, 0], [9, 9, 9, 9], [(9, 1, 1)], [0, 0, 0, 0], id="nobody need find a crowd"),
        pytest.param([5, 5, 6, 6], [9, 9, 9, 9], [(9, 1, 0)], [0, 0, 2, 1], id="two parts"),
        pytest.param([0, 0, 0, 0], [0, 0, 0, 0], [], [0, 0, 0, 0], id="all void"),
        pytest.param([5, 5, 6, 7], [0, 0, 0, 0], [], [0, 0, 0, 0], id="anything goes on void"),
        pytest.param([5, 5, 5, 5], [8, 8, 8, 8], [(8, 1, 0), (9, 1, 0)], [1, 1, 0, 1], id="no pixel of a true one"),
        pytest.param([5, 5, 5, 0], [9, 9, 9, 0], [(9, 1, 0, 5)], [0.6, 1, 0, 0], id="area as the file says"),
        pytest.param([5], [9], [TrueSegment(9, 1)], [1, 1, 0, 0], id="one pixel"),
    ],
)
def test_rules(prediction, truth, segments, expected):
    assert one(prediction, truth, segments) == pytest.approx(expected, abs=1e-15)


def test_other_category_is_no_pair():
    assert one([5, 5], [9, 9], [(9, 4, 0)]) == [0, 0, 1, 0]
    assert one([5, 5], [9, 9], [(9, 1, 0)], {5: 4}) == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_large_ids_are_distinguished(kind):
    """Floats of 64 bits would not."""
    ids = np.array([[2**60, 2**60 + 1, 2**60 + 2]], dtype=kind)
    segments = [(number, 1, 0) for number in ids[0].tolist()]
    counts = panoptic_quality(ids, dict.fromkeys(ids[0].tolist(), 1), ids, segments, CATEGORIES)
    assert counts.values[0].tolist() == [3, 3, 0, 0]
    with pytest.raises(ValueError, match=rf"the id {2**60} is in the map"):
        panoptic_quality(ids, {2**60 + 1: 1, 2**60 + 2: 1}, ids, segments, CATEGORIES)


def test_maps_without_pixels():
    empty = np.zeros((0, 5), dtype=np.int32)
    assert not panoptic_quality(empty, {}, empty, [], CATEGORIES).values.any()


def test_any_layout_in_memory():
    rng = np.random.default_rng(0)
    prediction, predicted, truth, segments = random_case(rng)
    expected = panoptic_quality(prediction, predicted, truth, segments, CATEGORIES).values
    for layout in (np.asfortranarray, lambda ids: np.flipud(np.flipud(ids).copy())):
        found = panoptic_quality(layout(prediction), predicted, layout(truth), segments, CATEGORIES)
        assert np.array_equal(found.values, expected)


def test_memory_is_that_of_the_maps():
    ids = np.arange(1, 64 * 64 + 1).reshape(64, 64)
    every = dict.fromkeys(ids.ravel().tolist(), 1)
    tracemalloc.start()
    counts = panoptic_quality(ids, every, ids, [(number, 1, 0) for number in every], CATEGORIES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.values[0].tolist() == [4096, 4096, 0, 0]
    assert peak < 16e6  # a table of all pairs would take 134 MB


A, B = np.array([[1, 2], [0, 0]]), np.array([[3, 3], [0, 0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prediction": A + 4},
            "prediction of the image 77: the ids 4, 5, 6 are in the map, but not in the list of segments",
        ),
        ({"truth": B * 9}, "ground truth of the image 77: the id 27 is in the map, but not in the list of segments"),
        ({"prediction": -A}, "prediction of the image 77: the ids -2, -1 are in the map"),
        (
            {"predicted": {1: 1, 2: 1, 9: 4}},
            "prediction of the image 77: the id 9 is in the list of segments, but not in the map",
        ),
        (
            {"predicted": {1: 1, 2: 5}},
            "prediction of the image 77: the segment 2 has the unknown category 5",
        ),
        ({"segments": [(3, 5, 0)]}, "ground truth of the image 77: the segment 3 has the unknown category 5"),
        (
            {"predicted": {0: 1, 1: 1, 2: 1}},
            "prediction of the image 77: a segment has the id 0, which stands for void",
        ),
        ({"segments": [(3, 1, 0), (3, 1, 0)]}, "ground truth of the image 77: the id 3 is listed more than once"),
        ({"segments": [(3, 1, 0, 1)], "prediction": np.where(B, 1, 0), "predicted": {1: 1}}, "than its area 1"),
        ({"truth": B[:1]}, r"image 77 differ in size: \(2, 2\) and \(1, 2\); predict at the image's own size"),
        ({"truth": B[None]}, r"ground truth of the image 77 must be \(H, W\) integers, got \(1, 2, 2\)"),
        ({"prediction": A / 2}, r"prediction of the image 77 must be \(H, W\) integers, got \(2, 2\) float64"),
    ],
)
def test_errors_name_the_wrong_value(changes, message):
    arguments = {"prediction": A, "predicted": {1: 1, 2: 4}, "truth": B, "segments": [(3, 1, 0)]}
    panoptic_quality(**arguments, categories=CATEGORIES, image=77)
    with pytest.raises(ValueError, match=message):
        panoptic_quality(**{**arguments, **changes}, categories=CATEGORIES, image=77)


def test_scores_by_their_formulas():
    values = np.array([[1.5, 2, 1, 0], [0, 0, 0, 3], [0, 0, 0, 0], [0.6, 1, 0, 1]])
    scores = PanopticCounts(CATEGORIES, values).scores(THINGS)
    first = {"pq": 1.5 / 2.5, "sq": 0.75, "rq": 2 / 2.5}
    last = {"pq": 0.6 / 1.5, "sq": 0.6, "rq": 1 / 1.5}
    zero = {"pq": 0, "sq": 0, "rq": 0}
    expected = dict(zip(CATEGORIES, (first, zero, zero, last)))
    assert {category: pytest.approx(found) for category, found in scores["per_class"].items()} == expected
    # Category 7 occurs nowhere and counts nowhere.
    assert scores["Things"] == pytest.approx({**first, "n": 1})
    assert scores["Stuff"] == pytest.approx({key: last[key] / 2 for key in last} | {"n": 2})
    assert scores["All"] == pytest.approx({key: (first[key] + last[key]) / 3 for key in first} | {"n": 3})
    assert PanopticCounts(CATEGORIES, values).scores(CATEGORIES)["Stuff"] == {**zero, "n": 0}
    assert PanopticCounts.zeros([]).scores([])["All"] == {**zero, "n": 0}


def test_counts_of_other_categories_do_not_add_up():
    with pytest.raises(ValueError, match="same categories, got 4 and 1"):
        PanopticCounts.zeros(CATEGORIES) + PanopticCounts.zeros([1])


def test_table_of_scores():
    scores = PanopticCounts((1, 4), np.array([[1.5, 2, 1, 0], [0, 0, 0, 1]])).scores({1})
    short, full = score_table(scores).splitlines(), score_table(scores, {1: "cat", 4: "a long name"}).splitlines()
    assert [line.split() for line in short[1:]] == [
        ["All", "30.00", "37.50", "40.00", "2"],
        ["Things", "60.00", "75.00", "80.00", "1"],
        ["Stuff", "0.00", "0.00", "0.00", "1"],
    ]
    assert [line.split()[-4:] for line in full[4:]] == [["cat", "60.00", "75.00", "80.00"], ["name"] + ["0.00"] * 3]
    assert len(full) == 6


def test_ids_in_a_map():
    for kind in ("uint8", "int64"):
        ids = np.random.default_rng(0).integers(0, 9, (7, 30)).astype(kind).repeat(3, 1)
        assert np.array_equal(segment_ids(ids), np.unique(ids))
