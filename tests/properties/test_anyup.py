"""Upsampling in bands is that of the definition with whole maps, for any sizes and limits of memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plain_anyup import reference_anyup, upsample
from spar_d2.refine import anyup_attention, anyup_encoding

MODEL = reference_anyup()
PIXEL_BYTES = 4 * 128


@st.composite
def cases(draw):
    """An image, features, size, limit of memory, rows, and numbers of elements at once."""
    (height, width), size = (tuple(draw(st.integers(1, most)) for _ in range(2)) for most in (28, 34))
    grid = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    image = torch.randn(1, 3, height, width, generator=generator)
    levels = draw(st.sampled_from([0, 1, 2]))
    if levels:  # few colors
        image = (image * levels).round().clamp(-2, 2)
    features = 3 * torch.randn(1, draw(st.integers(1, 9)), *grid, generator=generator)
    kept = draw(st.integers(0, 3 * height * width)) * PIXEL_BYTES
    start = draw(st.integers(0, size[0] - 1))
    rows = slice(start, draw(st.integers(start + 1, size[0])))
    at_once = draw(st.sampled_from([40, 1000])), draw(st.sampled_from([1, 1000, 100_000]))
    return image, features, size, kept, rows, at_once


@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=cases())
def test_bands_are_those_of_whole_maps(case):
    image, features, size, kept, rows, (pixels, elements) = case
    expected = upsample(MODEL.state_dict(), image, features, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(anyup_encoding._CHUNK_PIXELS, "cpu", pixels)
        patch.setitem(anyup_attention._TILE_ELEMENTS, "cpu", elements)
        patch.setattr(anyup_attention, "_BAND_PIXELS", pixels)
        attention = MODEL.prepare(image, features, size, kept)
        part = attention.rows(features, rows)
        whole = torch.cat([attention.rows(features, band) for band in attention.bands()], 2)
    atol = 2e-5 * max(1, expected.abs().max().item())
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(part.double(), expected[:, :, rows], rtol=0, atol=atol)
