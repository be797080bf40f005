"""Propagated scores are those of dense float64 matrices, for any grid, guide, image and number of classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
from spar_d2.refine import conjugate_gradients as solver
from spar_d2.refine import lposs, lposs_plus
from spar_d2.refine import patch_propagation as patches
from spar_d2.refine import pixel_propagation as pixels

CLASSES = st.one_of(st.integers(1, 6), st.just(60))


def generator_of(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))


def assert_close(result, exact, tolerance):
    assert (result - exact).abs().max() <= tolerance * max(1, exact.abs().max())


@st.composite
def grids(draw):
    """Scores, guide, patch and neighbors."""
    height, width, classes = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(CLASSES)
    generator = generator_of(draw)
    scores = 0.15 + 0.1 * torch.randn(height, width, classes, generator=generator)
    guide = torch.randn(draw(st.integers(6, 12)), 1, 1, generator=generator) * draw(st.sampled_from([0.0, 0.3, 2.0]))
    neighbors = draw(st.sampled_from([1, 2, 5, 20, 49, 400]))
    # Which of equally similar patches are the nearest is left open.
    if neighbors < height * width or draw(st.booleans()):
        guide = guide + torch.randn(len(guide), height, width, generator=generator)
    else:
        guide = guide.expand(-1, height, width)
    return scores, guide, draw(st.sampled_from([8, 14, 16, 100])), neighbors


@st.composite
def images(draw):
    """Scores and image."""
    height, width, classes = draw(st.integers(1, 16)), draw(st.integers(1, 16)), draw(CLASSES)
    generator = generator_of(draw)
    scores = 0.15 + 0.1 * torch.randn(classes, height, width, generator=generator)
    # Where all neighbors of a pixel differ so much that their weights underflow in float32, float64 gives others.
    contrast = draw(st.sampled_from([0.0, 0.01, 0.1, 0.4]))
    levels = draw(st.sampled_from([2, 4, 256]))
    noise = torch.randint(0, levels, (3, height, width), generator=generator) / (levels - 1)
    return scores, draw(st.floats(0, 0.6)) + contrast * noise


@pytest.mark.parametrize("chunked", [False, True])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=grids())
def test_patches_are_those_of_dense_matrices(chunked, case):
    with pytest.MonkeyPatch.context() as patch:
        if chunked:
            patch.setitem(patches._BLOCK_BYTES, "cpu", 64)
            patch.setattr(patches, "_COLUMN_BYTES", 400)
            patch.setitem(solver._VALUES, "cpu", 12)
        scores, guide, side, neighbors = case
        result = lposs(scores, guide, side, neighbours=neighbors)
    assert_close(result, plain.patch_propagation(scores, guide, side, neighbors), 1e-5)


@pytest.mark.parametrize("chunked", [False, True])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=images())
def test_pixels_are_those_of_dense_matrices(chunked, case):
    with pytest.MonkeyPatch.context() as patch:
        if chunked:
            patch.setattr(pixels, "_WEIGHT_BYTES", 4000)
            patch.setattr(pixels, "_CLASS_BYTES", 100_000)
            patch.setitem(solver._VALUES, "cpu", 3000)
        result = lposs_plus(*case)
    assert_close(result, plain.pixel_propagation(*case), 5e-5)
