"""Panoptic quality follows its definition for any pair of maps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from plain import panoptic_counts
from spar_d2.evaluation import panoptic_quality

CATEGORIES = (1, 4, 200)


@st.composite
def cases(draw):
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    truth = draw(arrays.arrays(np.int64, shape, elements=st.integers(0, 5)))
    # Close to the truth more often than chance would have it, so that there are pairs.
    prediction = np.where(draw(arrays.arrays(np.bool_, shape)), truth, draw(st.integers(0, 5)))
    category = st.sampled_from(CATEGORIES)
    ids = draw(st.permutations(sorted({*np.unique(truth).tolist(), *draw(st.sets(st.integers(1, 5)))} - {0})))
    segments = [(number, draw(category), draw(st.booleans())) for number in ids]
    predicted = {number: draw(category) for number in np.unique(prediction).tolist() if number}
    return prediction, predicted, truth, segments


@pytest.mark.slow
@settings(max_examples=250, deadline=None, derandomize=True)
@given(case=cases())
def test_counts_are_those_of_plain_loops(case):
    values = panoptic_quality(*case, CATEGORIES).values
    np.testing.assert_allclose(values, list(panoptic_counts(*case, CATEGORIES).values()), rtol=0, atol=1e-12)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_the_truth_is_a_perfect_prediction(case):
    _, _, truth, segments = case
    seen = [segment for segment in segments if segment[0] in truth]
    predicted = {number: category for number, category, _ in seen}
    counts = panoptic_quality(truth, predicted, truth, seen, CATEGORIES).values
    found = [sum(one[1] == category and not one[2] for one in seen) for category in CATEGORIES]
    # Crowds are neither found nor missed. Segments on the last crowd of their category are not counted.
    assert counts[:, 1].tolist() == found
    assert counts[:, 0].tolist() == found
    assert not counts[:, 3].any()
