"""Features against reference numbers of the method."""

import json

import pytest
import torch

from reference import GOLDEN, golden_input, golden_names, load_golden, reference_encoder


def check_features(name, reference_compat):
    arrays, meta = load_golden(name)
    encoder = reference_encoder(meta["model"], reference_compat)
    with torch.no_grad():
        features = encoder(golden_input(arrays, encoder))
    # (n, h, w, D) -> (n, D, h, w)
    expected = torch.from_numpy(arrays["features"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", golden_names("A_openclip-tiny") + golden_names("C_siglip-tiny"))
def test_single_pass(name):
    check_features(name, reference_compat=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    golden_names("A_openclip-tiny_64x64") + golden_names("A_openclip-tiny_96x160") + golden_names("C_siglip-tiny"),
)
def test_default_is_the_same_where_images_are_not_cut(name):
    check_features(name, reference_compat=False)


@pytest.mark.parametrize("model", ["openclip-tiny", "siglip-tiny"])
def test_weights_are_those_of_the_reference(model):
    path = GOLDEN / f"weights_{model}.json"
    if not path.is_file():
        pytest.skip(f"no reference numbers in {path.parent}")
    sums = json.loads(path.read_text())["params"]
    state = reference_encoder(model).state_dict()
    assert set(state) <= set(sums)
    for key, tensor in state.items():
        assert tensor.double().sum().item() == pytest.approx(sums[key]["sum"], rel=1e-6, abs=1e-4), key
