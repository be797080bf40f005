import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from reference import cells_of
from spar_d2.teacher.windows import WindowPlan, upsample_factor, window_starts


@pytest.mark.parametrize(
    ("patch", "stride", "factor"), [(16, 24, 2), (16, 16, 1), (16, 32, 1), (16, 8, 2), (16, 12, 4)]
)
def test_upsample_factors_of_the_reference(patch, stride, factor):
    assert upsample_factor(patch, stride) == factor


def random_plans(count):
    rng = random.Random(0)
    for _ in range(count):
        patch = rng.choice([8, 14, 16])
        window = patch * rng.randint(1, 5)
        stride = rng.randint(1, window)
        height, width = (window + patch * rng.randint(0, 9) for _ in range(2))
        yield WindowPlan(height, width, window, stride, patch)


def test_windows_cover_the_image_and_are_inside_it():
    for plan in random_plans(200):
        for length in (plan.height, plan.width):
            starts = window_starts(length, plan.window, plan.stride)
            assert starts[0] == 0
            assert starts[-1] == length - plan.window
            assert all(b - a <= plan.stride for a, b in itertools.pairwise(starts))
            assert len(set(starts)) == len(starts)
        assert (plan.counts >= 1).all()


@pytest.mark.slow
def test_counts_are_those_of_counting_every_window():
    for plan in random_plans(60):
        counted = torch.zeros(plan.mosaic_size).flatten()
        for cells in cells_of(plan, torch.arange(len(plan))):
            counted[cells] += 1
        assert torch.equal(counted.reshape(plan.mosaic_size), plan.counts)


def test_counts_where_two_starts_fall_into_one_cell():
    """An image that is no multiple of the cell has a last window less than a cell after the one before."""
    plan = WindowPlan(height=64 + 24 + 3, width=64, window=64, stride=24, patch=16)
    assert len(plan) == 3
    assert plan.counts.max() == 3


@pytest.mark.slow
def test_shares_are_what_refining_averaging_and_reducing_do():
    """For random plans, the two matrix products equal the single steps."""
    for plan in random_plans(40):
        side, factor = plan.window // plan.patch, plan.factor
        features = torch.randn(len(plan), 2, side, side, dtype=torch.float64)
        fine = F.interpolate(features, scale_factor=factor, mode="bilinear") if factor > 1 else features
        mosaic = torch.zeros(2, plan.counts.numel(), dtype=torch.float64)
        for window, cells in zip(fine, cells_of(plan, torch.arange(len(plan)))):
            mosaic[:, cells] += window.flatten(1)
        patches = (plan.height // plan.patch, plan.width // plan.patch)
        mean = (mosaic / plan.counts.flatten()).reshape(1, 2, *plan.mosaic_size)
        expected = F.interpolate(mean, size=patches, mode="bilinear")[0]
        rows, columns = (share.double() for share in plan.shares)
        grid = features.unflatten(0, (len(rows), len(columns)))
        torch.testing.assert_close(
            torch.einsum("ahy,aidyx,iwx->dhw", rows, grid, columns), expected, rtol=1e-5, atol=1e-6
        )
        for share, (first, last) in zip(rows, plan.rows_reached.tolist()):
            assert share[first].any() and share[last - 1].any()
            assert not share[:first].any() and not share[last:].any()
