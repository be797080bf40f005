import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plain import segmentation
from pretended_cuda import PretendedCuda
from reference import golden_names, load_golden
from spar_d2.modeling import banded_upsampling as bands
from spar_d2.modeling import class_probabilities, segment_features
from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores
from spar_d2.modeling.postprocessing import cosine_scores, score_probabilities, segment_scores


def whole(low, size, padded=None):
    output = torch.empty(low.shape[2], *size)
    for place, band in UpsampledScores([ScoreMap(low, padded)], size).bands():
        output[(slice(None), *place)] = band.permute(2, 0, 1)
    return output


@pytest.mark.parametrize("name", golden_names("E_syn"))
def test_segmentation_of_the_reference(name):
    arrays, meta = load_golden(name)
    # (1, h, w, D) -> (D, h, w)
    features = torch.from_numpy(arrays["patch_features"])[0].permute(2, 0, 1)
    text, size = torch.from_numpy(arrays["query_features"]), tuple(meta["ori_shape"])
    query_class = torch.tensor(meta["query_idx"])
    logits = whole(cosine_scores(features, text), size)
    torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"])[0], rtol=0, atol=1e-5)

    probabilities = class_probabilities(features, text, query_class, size, logit_scale=meta["logit_scale"])
    expected = torch.from_numpy(arrays["class_prob_before_area"])
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-4)

    labels = segment_features(
        features, text, query_class, size, None, meta["logit_scale"], meta["prob_thd"], meta["area_thd"]
    )
    different = int((labels.numpy() != arrays["pred"][0]).sum())
    # Pixels so close to a tie or to the threshold that rounding decides.
    assert different <= meta["pixels_with_top2_margin_below_1e_5"] + meta["pixels_within_1e_5_of_prob_thd"]


@pytest.mark.slow
@pytest.mark.parametrize("band_bytes", [1, 5000, 1 << 30])
@pytest.mark.parametrize("seed", range(8))
def test_bands_give_the_labels_of_the_full_computation(seed, band_bytes, monkeypatch):
    monkeypatch.setitem(bands._BAND_BYTES, "cpu", band_bytes)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    h, w, queries, classes = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 12), rng.randint(1, 6)
    # Bands of a single pixel take their time.
    patch = 4 if band_bytes == 1 else 16
    padded = (h * patch, w * patch)
    size = (padded[0] - rng.randrange(patch), padded[1] - rng.randrange(patch))
    features, text = torch.randn(5, h, w), F.normalize(torch.randn(max(queries, classes), 5), dim=1)
    query_class = torch.tensor([*range(classes), *(rng.randrange(classes) for _ in range(len(text) - classes))])
    for prob_threshold in (0.0, 0.3):
        for area_threshold in (None, 0.0, 0.2, 0.9):
            arguments = (features, text, query_class, size, padded, 10.0, prob_threshold, area_threshold)
            different = (segment_features(*arguments) != segmentation(*arguments)).float().mean()
            assert different < 2e-3, (prob_threshold, area_threshold)


def test_padding_keeps_pixels_where_they_are():
    """A grid over a padded image: the labels of a column of patches end where the patches do."""
    features = torch.zeros(2, 1, 4)
    features[0, :, :2], features[1, :, 2:] = 1, 1
    labels = segment_features(features, torch.eye(2), torch.arange(2), (10, 60), padded_size=(16, 64))
    assert labels.shape == (10, 60)
    assert (labels[:, :32] == 0).all()
    assert (labels[:, 32:] == 1).all()


def test_fractional_padded_sizes():
    """An image that was enlarged by a factor covers a fraction of a pixel of the result."""
    low = torch.randn(3, 4, 2)
    exact = whole(low, (30, 40), (30.0, 40.0))
    assert (whole(low, (30, 40), (30.001, 40.001)) - exact).abs().max() < 1e-3


def test_where_every_class_is_removed_all_is_class_zero():
    features, text = torch.eye(2)[..., None], torch.eye(2)
    labels = segment_features(features, text, torch.tensor([3, 5]), (2, 4), area_threshold=0.5)
    assert not labels.any()


def test_class_zero_is_neither_counted_nor_removed():
    features = torch.tensor([[[1.0, 1, 1, 0]], [[0.0, 0, 0, 1]]])
    labels = segment_features(features, torch.eye(2), torch.arange(2), (1, 4), area_threshold=0.99)
    assert labels.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(3, 2, 2)}, "features"),
        ({"query_class": torch.arange(3)}, "query_class"),
        ({"query_class": torch.arange(2) - 1}, "query_class must be .*, got -1"),
        ({"query_class": torch.arange(0), "text": torch.zeros(0, 2)}, "query_class"),
        ({"size": (0, 4)}, "size"),
        ({"size": (-1, 4)}, "size"),
        ({"padded_size": (3, 3)}, "padded_size"),
        ({"prob_threshold": 2.0}, "prob_threshold"),
        ({"area_threshold": -0.1}, "area_threshold"),
        ({"logit_scale": -1.0}, "logit_scale"),
    ],
)
def test_mismatched_arguments_are_named(changes, message):
    arguments = {"features": torch.zeros(2, 2, 2), "text": torch.eye(2), "query_class": torch.arange(2), "size": (4, 4)}
    with pytest.raises(ValueError, match=message):
        segment_features(**{**arguments, **changes})


@pytest.mark.slow
def test_no_map_of_all_classes_is_made():
    """Peak memory of many classes is far below one full map of them."""
    queries, side = 200, 400
    features, text = torch.randn(8, 25, 25), F.normalize(torch.randn(queries, 8), dim=1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel() * result.element_size())
            return result

    with Watch():
        segment_features(features, text, torch.arange(queries), (side, side), prob_threshold=0.1, area_threshold=0.01)
    assert largest < queries * side * side * 4 / 10
    assert largest >= side * side * 8, "the labels themselves are counted"


def test_labels_are_int64_of_the_given_size():
    labels = segment_features(torch.randn(2, 3, 5), torch.eye(2), torch.arange(2), (37, 51))
    assert labels.dtype == torch.int64
    assert labels.shape == (37, 51)
    assert np.isin(labels.numpy(), [0, 1]).all()


def results(features, text, maps):
    """Results of each function for the same image."""
    classes, size = torch.arange(6), (30, 40)
    return {
        "cosine_scores": cosine_scores(features, text),
        "segment_features": segment_features(features, text, classes, size, None, 40.0, 0.2, 0.05),
        "segment_scores": segment_scores(maps, classes, size, 40.0, 0.2, 0.05),
        "class_probabilities": class_probabilities(features, text, classes, size),
        "score_probabilities": score_probabilities(maps, classes, size),
    }


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_scores_are_float32_under_autocast_too(autocast, given):
    """Results are the same inside autocast, bit for bit, and those of half-precision inputs equal float32 ones."""
    features, text = torch.randn(16, 3, 4).to(given), F.normalize(torch.randn(6, 16), dim=1).to(given)
    maps = [ScoreMap(torch.randn(3, 4, 6).to(given)), ScoreMap(torch.randn(2, 5, 6).to(given), mirrored=True)]
    in_float32 = [ScoreMap(grid.scores.float(), None, grid.mirrored) for grid in maps]
    expected = results(features.float(), text.float(), in_float32)
    for inside in (False, True):
        with torch.autocast("cpu", autocast, enabled=inside):
            found = results(features, text, maps)
        for name, values in expected.items():
            assert found[name].dtype == values.dtype and torch.equal(found[name], values), (name, inside)


def test_no_tf32_on_a_gpu():
    """Products are in full float32 where a user switched TF32 on, which stays on."""
    used = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                used.add(torch.get_float32_matmul_precision())
            return function(*args, **(kwargs or {}))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with PretendedCuda(), Watch():
            cosine_scores(torch.randn(16, 3, 4, device="cuda"), torch.randn(6, 16, device="cuda"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert used == {"highest"}


@pytest.mark.parametrize("area_threshold", [None, 0.3])
def test_classes_may_have_any_numbers(area_threshold):
    features, text = torch.randn(16, 3, 4), F.normalize(torch.randn(6, 16), dim=1)
    numbers = torch.tensor([0, 4_000_000, 17])
    arguments = ((30, 40), None, 40.0, 0.1, area_threshold)
    expected = segment_features(features, text, torch.arange(6) % 3, *arguments)
    assert torch.equal(segment_features(features, text, numbers.repeat(2), *arguments), numbers[expected])


def test_number_of_classes_can_be_given():
    features, text, classes = torch.randn(16, 3, 4), F.normalize(torch.randn(6, 16), dim=1), torch.arange(6) // 2
    probabilities = class_probabilities(features, text, classes, (30, 40), classes=5)
    assert torch.equal(probabilities[:3], class_probabilities(features, text, classes, (30, 40)))
    assert probabilities.shape[0] == 5 and not probabilities[3:].any()


@pytest.mark.parametrize(
    "read",
    [
        lambda: UpsampledScores([], (4, 4)),
        lambda: segment_scores([], torch.zeros(1).long(), (4, 4)),
        lambda: score_probabilities([], torch.zeros(1).long(), (4, 4), 40.0, 1),
    ],
    ids=["upsampled", "labels", "probabilities"],
)
def test_no_maps_are_refused(read):
    with pytest.raises(ValueError, match="maps .*got none"):
        read()
