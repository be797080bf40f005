"""Images of any size, for every family of encoders."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import example_encoder
from spar_d2.encoders import FAMILIES
from spar_d2.modeling import segment_features

SIDES = st.integers(1, 200)


@functools.cache
def encoder_of(family: str):
    torch.manual_seed(0)
    return example_encoder(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES)
@torch.no_grad()
def test_any_size_is_encoded_as_its_padded_image_and_segmented(family, height, width):
    encoder = encoder_of(family)
    rows, columns = (-(-side // encoder.patch_size) for side in (height, width))
    padded_size = (rows * encoder.patch_size, columns * encoder.patch_size)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))
    features = encoder(images)
    assert features.shape == (2, encoder.embed_dim, rows, columns)
    assert features.isfinite().all()
    padding = (0, padded_size[1] - width, 0, padded_size[0] - height)
    assert torch.equal(encoder(F.pad(images, padding)), features)
    torch.testing.assert_close(encoder(images[1:]), features[1:], rtol=1e-3, atol=1e-4)
    text = F.normalize(torch.randn(3, encoder.embed_dim), dim=1)
    labels = segment_features(features[0], text, torch.arange(3), (height, width), padded_size)
    assert labels.shape == (height, width)
    assert 0 <= int(labels.min()) and int(labels.max()) <= 2
