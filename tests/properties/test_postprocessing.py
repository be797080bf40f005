"""Labels are those of full maps, for any grid, classes and thresholds."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from plain import segmentation
from spar_d2.modeling import banded_upsampling as bands
from spar_d2.modeling import class_probabilities, segment_features

PATCH = 4


@st.composite
def cases(draw):
    """Arguments of ``segment_features`` in float32, and the same in float64 for the plain implementation."""
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    # In any order, and some classes have no query.
    query_class = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randn(6, height, width, generator=generator, dtype=torch.float64)
    text = F.normalize(torch.randn(len(query_class), 6, generator=generator, dtype=torch.float64), dim=1)
    padded = (height * PATCH, width * PATCH)
    size = tuple(side - draw(st.integers(0, PATCH - 1)) for side in padded)
    thresholds = draw(st.sampled_from([0.0, 0.05, 0.2, 0.6])), draw(st.sampled_from([None, 0.0, 0.02, 0.2, 1.0]))
    rest = (torch.tensor(query_class), size, padded, draw(st.sampled_from([1.0, 10.0, 40.0])), *thresholds)
    return (features.float(), text.float(), *rest), (features, text, *rest)


@pytest.mark.slow
@pytest.mark.parametrize("band_bytes", [64, 1 << 30])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases())
def test_labels_are_those_of_full_maps(band_bytes, case):
    ours, exact = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bands._BAND_BYTES, "cpu", band_bytes)
        labels = segment_features(*ours)
    # Rounding decides where two classes are as probable, or one as probable as the threshold says.
    different = int((labels != segmentation(*exact)).sum())
    assert different <= 1


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases())
def test_the_most_probable_class_is_the_label(case):
    features, text, query_class, size, padded, scale, *_ = case[0]
    probabilities = class_probabilities(features, text, query_class, size, padded, scale)
    assert probabilities.shape == (int(query_class.max()) + 1, *size)
    assert probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-6
    labels = segment_features(features, text, query_class, size, padded, scale)
    chosen = probabilities.gather(0, labels[None])[0]
    torch.testing.assert_close(chosen, probabilities.amax(0), rtol=0, atol=1e-5)
