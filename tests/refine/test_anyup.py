"""Learned upsampling: reference numbers, equal results in bands, memory, and bad input."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from live_memory import LiveMemory
from plain_anyup import anyup_weight, reference_anyup
from pretended_cuda import PretendedCuda
from reference import ROOT, reference_image
from spar_d2.refine import AnyUp, anyup_attention, anyup_encoding, imagenet_normalized
from spar_d2.refine.anyup_layers import Moments

GOLDEN = ROOT / "tests" / "data" / "golden_refine"
CASES = sorted(path.stem for path in GOLDEN.glob("U_*.npz"))


@pytest.fixture(scope="module")
def model():
    """Tests must not change it."""
    return reference_anyup()


def guidance(height: int, width: int) -> torch.Tensor:
    """(1, 3, H, W)."""
    return imagenet_normalized(torch.from_numpy(reference_image(height, width)).permute(2, 0, 1)[None].float() / 255)


def random_features(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_parameters_are_those_of_the_reference():
    expected = json.loads((GOLDEN / "weights_anyup.json").read_text())
    state = AnyUp().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {k: v["shape"] for k, v in expected.items()}
    assert sum(value.numel() for value in state.values()) == 878_080
    for key, value in expected.items():
        weight = anyup_weight(key, tuple(value["shape"])).double()
        assert weight.abs().sum().item() == pytest.approx(value["abs_sum"], rel=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_reference_numbers(model, name):
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        pixels, features, text, expected, labels = (
            torch.from_numpy(arrays[key]) for key in ("image_u8", "features", "text", "out_sub", "label")
        )
    # In float64, as the reference images were normalized.
    image = imagenet_normalized(pixels.permute(0, 3, 1, 2).double() / 255).float()
    size = tuple(meta["out"])
    output = model(image, features, size=size)
    assert output.shape == (len(features), features.shape[1], *size)
    atol = 1e-5 * max(1, expected.abs().max().item())
    torch.testing.assert_close(output[:, :, :: meta["step"], :: meta["step"]], expected, rtol=0, atol=atol)
    attention = model.prepare(image, features, size)
    scores = torch.cat([attention.scores(text, rows) for rows in attention.bands()], 2)
    best = scores.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4 * max(1, scores.abs().max().item())
    assert clear.float().mean() > 0.99
    assert torch.equal(scores.argmax(1)[clear], labels.long()[clear])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_have_the_dtype_of_the_features_and_the_accuracy_of_float32(model, dtype):
    image, features = guidance(24, 32).to(dtype), random_features(1, 6, 4, 5).to(dtype)
    expected = model(image.float(), features.float(), (9, 11))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image, features, (9, 11))
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))


def test_statistics_of_parts_are_those_of_the_map():
    norm = torch.nn.GroupNorm(2, 8)
    # A mean far from 0, where differences of squares would be wrong.
    x = random_features(50, 8) + 3000
    counts = torch.arange(50) % 3 + 1
    expected = F.group_norm(x.repeat_interleave(counts, 0).T[None].double(), 2, eps=norm.eps)[0].T
    moments = Moments()
    for part, weights in zip(x.split(20), counts.split(20)):
        moments.add(part, weights.float())
    scale, shift = moments.affine(norm)
    torch.testing.assert_close((x * scale + shift).double(), expected.unique_consecutive(dim=0), rtol=0, atol=1e-3)


def test_colors_of_the_same_hash_are_told_apart(model, monkeypatch):
    image, features = guidance(24, 32), random_features(1, 6, 4, 5)
    expected = model(image, features, (9, 11))
    monkeypatch.setattr(anyup_encoding, "_HASH", (0, 0, 0))
    torch.testing.assert_close(model(image, features, (9, 11)), expected, rtol=0, atol=1e-5)


def test_images_of_a_batch_are_independent(model):
    image = torch.cat([guidance(24, 32), guidance(24, 32).flip(3)])
    features = random_features(2, 6, 4, 5)
    together = model(image, features, (12, 16))
    alone = torch.cat([model(image[n : n + 1], features[n : n + 1], (12, 16)) for n in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    attention = model.prepare(image, features, (12, 16))
    torch.testing.assert_close(attention.rows(features, slice(None)), alone, rtol=0, atol=1e-5)


def test_cosines_are_those_of_upsampled_features(model):
    image, features = guidance(40, 56), random_features(1, 12, 5, 7)
    text = F.normalize(random_features(5, 12), dim=1)
    attention = model.prepare(image, features, (40, 56))
    upsampled = attention.rows(features, slice(10, 31))
    expected = torch.einsum("qc,bchw->bqhw", text, upsampled)
    torch.testing.assert_close(attention.scores(text, slice(10, 31)), expected, rtol=0, atol=1e-5)
    lengths = upsampled.norm(dim=1, keepdim=True)
    torch.testing.assert_close(attention.cosines(text, slice(10, 31)), expected / lengths, rtol=0, atol=1e-5)


def test_memory_is_that_of_kept_rows_and_a_band(model, monkeypatch):
    monkeypatch.setitem(anyup_encoding._CHUNK_PIXELS, "cpu", 256)
    monkeypatch.setitem(anyup_attention._TILE_ELEMENTS, "cpu", 30_000)
    image, features, scores = guidance(40, 96), random_features(1, 8, 10, 24), random_features(1, 10, 10, 24)
    map_bytes = 40 * 96 * 128 * 4

    def peak(kept_bytes: int) -> float:
        """In maps. Attention of all pixels to all cells would be 7.5."""
        with LiveMemory() as memory:
            attention = model.prepare(image, features, (40, 96), kept_bytes)
            attention.rows(scores, slice(20, 24))
        return memory.peak / map_bytes

    least = peak(0)
    assert least < 0.9
    assert 0.9 < peak(map_bytes // 2) <= least + 0.5


def test_the_host_waits_once_on_a_gpu(model):
    image, features, text = guidance(40, 56), random_features(1, 12, 5, 7), random_features(3, 12)
    expected = model.prepare(image, features, (40, 56)).scores(text, slice(8, 24))
    on_device = copy.deepcopy(model)
    with PretendedCuda() as gpu:
        on_device.to("cuda")
        given = [tensor.to("cuda") for tensor in (image, features, text)]
        gpu.reset()
        attention = on_device.prepare(given[0], given[1], (40, 56))
        scores = attention.scores(given[2], slice(8, 24))
        assert gpu.waits_in("spar_d2") <= 1, gpu.report()
        assert scores.is_cuda
        scores = scores.cpu()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


IMAGE, FEATURES = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 2, 3)
NAN = torch.full((1,), math.nan)


@pytest.mark.parametrize(
    ("argument", "image", "features", "size"),
    [
        ("image", IMAGE[0], FEATURES, (8, 8)),
        ("image", IMAGE[:, :1], FEATURES, (8, 8)),
        ("image", IMAGE.byte(), FEATURES, (8, 8)),
        ("image", IMAGE + NAN, FEATURES, (8, 8)),
        ("features", IMAGE, FEATURES[0], (8, 8)),
        ("features", IMAGE, FEATURES.long(), (8, 8)),
        ("features", IMAGE, FEATURES[:, :0], (8, 8)),
        ("features", IMAGE, FEATURES[:, :, :1], (8, 8)),
        ("features", IMAGE, FEATURES[..., :1], (8, 8)),
        ("features", IMAGE, FEATURES / NAN, (8, 8)),
        ("features", IMAGE, FEATURES.expand(2, -1, -1, -1), (8, 8)),
        ("size", IMAGE, FEATURES, (0, 8)),
        ("size", IMAGE, FEATURES, (8, 2.5)),
        ("size", IMAGE, FEATURES, (8,)),
        ("size", IMAGE, FEATURES, 8),
    ],
)
def test_bad_input_is_named(model, argument, image, features, size):
    for method in (model, model.prepare):
        with pytest.raises(ValueError, match=f"^{argument} .*got"):
            method(image, features, size)


def test_bad_values_rows_and_text_are_named(model):
    attention = model.prepare(IMAGE, FEATURES, (8, 8))
    for values in (FEATURES[0], FEATURES[..., :2], FEATURES.expand(2, -1, -1, -1), FEATURES.long()):
        with pytest.raises(ValueError, match="^values .*got"):
            attention.rows(values, slice(0, 2))
    for rows in (slice(0, 9), slice(3, 3), slice(-2, None), slice(0, 8, 2)):
        with pytest.raises(ValueError, match="^rows .*got"):
            attention.rows(FEATURES, rows)
    for text in (torch.zeros(4), torch.zeros(2, 5), torch.zeros(2, 4).long()):
        for method in (attention.scores, attention.cosines):
            with pytest.raises(ValueError, match="^text .*got"):
                method(text, slice(0, 2))


def test_pixels_for_guidance_are_checked():
    with pytest.raises(ValueError, match="^image .*got"):
        imagenet_normalized(torch.zeros(3, 4, 4, dtype=torch.uint8))
