"""Regions of label maps, against pycocotools, SciPy and plain masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco
from scipy import ndimage

from spar_d2.results import Segmentation
from spar_d2.results.regions import find_regions

NAMES = ["sky", "", "cat"]
label_maps = arrays.arrays(
    np.int64, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 2)
)


def full_mask(region, shape) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    x0, y0, x1, y1 = region.box
    mask[y0:y1, x0:x1] = region.mask
    return mask


def area_of(ring: np.ndarray) -> float:
    x, y = ring.T
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def inside(ring: np.ndarray, shape) -> np.ndarray:
    """Whether the middle of each pixel is inside a ring along pixel edges, by the edges crossed to the left of it."""
    crossed = np.zeros((shape[0], shape[1] + 1), dtype=int)
    for (x0, y0), (x1, y1) in zip(ring.astype(int), np.roll(ring, -1, 0).astype(int)):
        assert (x0 == x1) != (y0 == y1), "every edge is horizontal or vertical"
        if x0 == x1:
            crossed[min(y0, y1) : max(y0, y1), x0] += 1
    return crossed.cumsum(1)[:, :-1] % 2 == 1


@settings(max_examples=150, deadline=None)
@given(label_maps)
def test_regions_are_the_connected_components(labels):
    regions = find_regions(labels, NAMES)
    expected = []
    for number in range(3):
        parts, count = ndimage.label(labels == number, structure=np.ones((3, 3)))
        expected += [(number, (parts == part).tobytes()) for part in range(1, count + 1)]
    found = [(region.number, full_mask(region, labels.shape).tobytes()) for region in regions]
    assert sorted(found) == sorted(expected)
    areas = [region.area for region in regions]
    assert areas == [region.mask.sum() for region in regions] and areas == sorted(areas, reverse=True)
    for region in regions:
        assert region.mask[0].any() and region.mask[-1].any() and region.mask[:, 0].any() and region.mask[:, -1].any()
        assert region.name == (NAMES[region.number] or "class 1") and region.score is None


@settings(max_examples=150, deadline=None)
@given(label_maps)
def test_run_lengths_are_those_of_pycocotools(labels):
    for region in find_regions(labels, NAMES):
        mask = full_mask(region, labels.shape)
        encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert region.rle() == {"size": list(labels.shape), "counts": encoded["counts"].decode()}


@settings(max_examples=150, deadline=None)
@given(label_maps)
def test_rings_enclose_the_pixels_and_nothing_else(labels):
    for region in find_regions(labels, NAMES):
        outer, *holes = region.rings()
        assert area_of(outer) - sum(map(area_of, holes)) == region.area
        filled = inside(outer, labels.shape)
        for hole in holes:
            assert filled[inside(hole, labels.shape)].all(), "holes are inside"
            filled &= ~inside(hole, labels.shape)
        assert np.array_equal(filled, full_mask(region, labels.shape))


@settings(max_examples=50, deadline=None)
@given(label_maps, st.integers(0, 20))
def test_small_regions_are_left_out(labels, smallest):
    areas = [region.area for region in find_regions(labels, NAMES)]
    assert [r.area for r in find_regions(labels, NAMES, smallest)] == [a for a in areas if a >= smallest]


def test_scores_are_means_over_the_regions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (5, 7)).repeat(6, 0).repeat(6, 1)[:27, :40]
    # Patches of 8 pixels that cover more than the image. A gradient is upsampled exactly, away from the border.
    rows, columns = np.mgrid[:4, :6]
    scores = np.stack([0.1 * rows, 0.1 * columns, np.full(rows.shape, 0.25)]).astype(np.float32)
    result = Segmentation.of(labels, NAMES, scores, 8)
    y, x = (((np.arange(side) + 0.5) / 8 - 0.5).clip(0, cells - 1) for side, cells in zip(labels.shape, (4, 6)))
    pixels = np.stack(np.broadcast_arrays(0.1 * y[:, None], 0.1 * x, np.array([[0.25]])))
    for region in result.regions():
        mask = full_mask(region, labels.shape)
        assert region.score == pytest.approx(pixels[region.number][mask].mean(), abs=1e-5)


def test_simplified_rings_stay_close_and_small_holes_vanish():
    y, x = np.mgrid[:60, :60]
    labels = ((y - 30) ** 2 + (x - 30) ** 2 < 400).astype(int)
    labels[30, 30] = 0
    (disk,) = (region for region in find_regions(labels, NAMES) if region.number == 1)
    exact, simple = disk.rings(), disk.rings(1.0)
    assert len(exact) == 2 and len(simple) == 1
    assert len(simple[0]) < len(exact[0]) / 2
    assert area_of(simple[0]) == pytest.approx(disk.area, rel=0.05)
    (dot,) = (region for region in find_regions(labels, NAMES) if region.area == 1)
    assert len(dot.rings(5.0)[0]) == 4, "a ring that would vanish is kept"


def test_many_regions_of_a_large_image_need_little_memory():
    import tracemalloc

    labels = np.random.default_rng(0).integers(0, 20, (16, 24)).repeat(16, 0).repeat(16, 1)
    tracemalloc.start()
    try:
        regions = Segmentation.of(labels, [str(n) for n in range(20)], None).regions()
        for region in regions:
            region.rle()
            region.rings()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(regions) > 250
    assert peak < 40 * labels.size, "far less than a mask for each region"


@pytest.mark.parametrize("value", [-1, "a", float("nan"), None])
def test_wrong_areas_and_tolerances_are_refused(value):
    result = Segmentation.of(np.zeros((2, 2), dtype=int), NAMES)
    with pytest.raises(ValueError, match=f"min_area must be at least 0 pixels, got {value!r}"):
        result.regions(value)
    with pytest.raises(ValueError, match=f"tolerance must be a number of at least 0 pixels, got {value!r}"):
        result.to_labelme("a.jpg", tolerance=value)
