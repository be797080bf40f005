"""Features against reference numbers of the method."""

import pytest
import torch

from reference import golden_input, golden_names, load_golden
from spar_d2.encoders import OpenCLIPEncoder


@pytest.mark.parametrize("name", golden_names("A_openclip-tiny"))
def test_single_pass(name, reference_clip):
    arrays, _ = load_golden(name)
    encoder = OpenCLIPEncoder(reference_clip.visual, reference_compat=True)
    with torch.no_grad():
        features = encoder(golden_input(arrays, encoder))
    # (n, h, w, D) -> (n, D, h, w)
    expected = torch.from_numpy(arrays["features"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", golden_names("A_openclip-tiny_64x64") + golden_names("A_openclip-tiny_96x160"))
def test_default_is_the_same_at_whole_patches_of_another_count(name, reference_clip):
    arrays, _ = load_golden(name)
    encoder = OpenCLIPEncoder(reference_clip.visual)
    with torch.no_grad():
        features = encoder(golden_input(arrays, encoder))
    expected = torch.from_numpy(arrays["features"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
