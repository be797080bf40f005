"""The authors' own numbers of LPOSS and LPOSS+; RULES.md beside them says how they were made."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reference import ROOT, SHARED
from spar_d2.refine import lposs, lposs_plus

GOLDEN_REFINE = ROOT / "tests" / "data" / "golden_refine"
# One more case is made from a photo.
FILES = {path.stem: path for place in (SHARED / "golden_refine", GOLDEN_REFINE) for path in place.glob("[PXE]_*.npz")}


def cases(kind):
    return sorted(name for name in FILES if name.startswith(kind))


def load(name):
    with np.load(FILES[name]) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}, json.loads(
            FILES[name].with_suffix(".json").read_text()
        )


def assert_close(result, reference, tolerance):
    assert result.shape == reference.shape and result.dtype == torch.float32
    scale = max(1, reference.abs().max().item())
    assert (result - reference).abs().max().item() <= tolerance * scale


def pixels(arrays):
    return arrays["image_u8"].permute(2, 0, 1).float() / 255


def resized(scores, size):
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("name", cases("P"))
def test_patches_are_those_of_the_reference(name):
    arrays, about = load(name)
    result = lposs(arrays["scores"], arrays["guide"], about["patch"], neighbours=about["k"])
    assert_close(result, arrays["z"], 1e-5)


@pytest.mark.parametrize("name", cases("X"))
def test_pixels_are_those_of_the_reference(name):
    arrays, _ = load(name)
    assert_close(lposs_plus(arrays["scores"], pixels(arrays)), arrays["z"], 5e-5)


@pytest.mark.parametrize("name", cases("E"))
def test_labels_of_both_in_a_row_are_those_of_the_reference(name):
    arrays, about = load(name)
    image, patch, text = pixels(arrays), about["patch"], arrays["text"]
    grid = tuple(math.ceil(side / patch) for side in image.shape[1:])
    features = F.normalize(arrays["features"], dim=0)
    if features.shape[1:] != grid:
        features = resized(features, grid)
    scores = torch.einsum("dhw,qd->hwq", F.normalize(features, dim=0), text)
    refined = lposs(scores, arrays["guide"], patch)
    assert_close(refined, arrays["patch_z"], 1e-5)
    scores = refined.permute(2, 0, 1)
    if about["pixel"]:
        scores = lposs_plus(resized(scores, image.shape[1:]), image)
        assert_close(scores[:, ::3, ::3], arrays["pixel_z_sub"], 5e-5)
    background = len(text) - about["num_classes"] + 1
    scores = torch.cat([scores[:background].amax(0, keepdim=True), scores[background:]])
    scores = resized(scores, about["out"])
    assert_close(scores[:, ::3, ::3], arrays["score_sub"], 5e-5)
    first, second = scores.topk(2, dim=0).values
    clear = first - second > 1e-4 * max(1, scores.abs().max().item())
    assert clear.float().mean() > 0.99
    assert torch.equal(scores.argmax(0)[clear], arrays["label"].long()[clear])


def test_all_kinds_of_cases_are_here():
    assert min(len(cases(kind)) for kind in "PXE") >= 2
