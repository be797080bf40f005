"""Plans of sliding windows, beside counting window by window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spar_d2.teacher.windows import WindowPlan


@st.composite
def plans(draw):
    patch = draw(st.sampled_from([8, 14, 16]))
    window = patch * draw(st.integers(1, 5))
    stride = draw(st.integers(1, window))
    height, width = (window + patch * draw(st.integers(0, 8)) for _ in range(2))
    return WindowPlan(height, width, window, stride, patch)


def starts_by_steps(length, window, stride):
    starts = [0]
    while starts[-1] < length - window:
        starts.append(min(starts[-1] + stride, length - window))
    return starts


def counted(plan: WindowPlan) -> torch.Tensor:
    seen = torch.zeros(plan.mosaic_size)
    for top, left in plan.origins.tolist():
        rows, columns = (slice(start // plan.cell, start // plan.cell + plan.window_cells) for start in (top, left))
        seen[rows, columns] += 1
    return seen


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(plan=plans())
def test_windows_are_at_multiples_of_the_stride_and_are_counted(plan):
    tops, lefts = (starts_by_steps(side, plan.window, plan.stride) for side in (plan.height, plan.width))
    assert plan.origins.tolist() == [[top, left] for top in tops for left in lefts]
    assert torch.equal(plan.counts, counted(plan))
    assert plan.counts.min() >= 1


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(plan=plans())
def test_constant_features_stay_constant(plan):
    # Rows (tops, h, w): the sum of all windows in a row of patches, for windows that are 1 everywhere.
    for share in plan.shares:
        torch.testing.assert_close(share.sum((0, 2)), torch.ones(share.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(plan=plans(), count=st.integers(1, 40), shifts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_windows_are_drawn_from_the_plan_by_their_probability(plan, count, shifts):
    expected = torch.zeros(len(plan), dtype=torch.float64)
    for number, (top, left) in enumerate(plan.origins.tolist()):
        rows, columns = (slice(start // plan.cell, start // plan.cell + plan.window_cells) for start in (top, left))
        expected[number] = (1 / plan.counts[rows, columns].double()).sum()
    torch.testing.assert_close(plan.probability, expected / expected.sum(), rtol=1e-6, atol=1e-12)
    chosen = plan.spread(count, torch.tensor([shifts]))
    assert chosen.shape == (1, count)
    assert 0 <= int(chosen.min()) and int(chosen.max()) < len(plan)
