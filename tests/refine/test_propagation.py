"""Interface of the propagations: one graph for many columns, chunks, dtypes, memory and errors."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from spar_d2.refine import PatchGraph, PixelGraph, lposs, lposs_plus
from spar_d2.refine import conjugate_gradients as solver
from spar_d2.refine import patch_propagation as patches
from spar_d2.refine import pixel_propagation as pixels


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def photo(height, width):
    return 0.3 + 0.4 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))


def assert_same(result, expected):
    """Equal up to rounding in another order."""
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= 5e-6 * max(1, expected.abs().max())


def peak_of_tensors(function):
    """Largest number of bytes that a call allocates at a time."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_a_graph_of_patches_serves_any_columns():
    guide, scores = draw(8, 5, 7), draw(5, 7, 12)
    graph = PatchGraph(guide, 16, neighbours=9)
    expected = lposs(scores, guide, 16, neighbours=9).flatten(0, 1)
    columns = scores.flatten(0, 1)
    assert_same(graph.propagate(columns), expected)
    parts = [graph.propagate(part) for part in columns.split(5, 1)]
    assert_same(torch.cat(parts, 1), expected)
    assert torch.equal(columns, scores.flatten(0, 1)), "the input is not modified"


def test_a_graph_of_pixels_serves_any_classes():
    image, scores = photo(9, 13), draw(7, 9, 13)
    graph, expected = PixelGraph(image), lposs_plus(scores, image)
    parts = [graph.propagate(part) for part in scores.split(3)]
    assert_same(torch.cat(parts), expected)


def test_chunks_of_columns_give_the_same(monkeypatch):
    guide, scores = draw(8, 6, 5), draw(6, 5, 11)
    expected = lposs(scores, guide, 16, neighbours=10)
    monkeypatch.setattr(patches, "_COLUMN_BYTES", 4 * 30 * 4)
    monkeypatch.setitem(patches._BLOCK_BYTES, "cpu", 4 * 30 * 7)
    monkeypatch.setitem(solver._VALUES, "cpu", 17)
    assert_same(lposs(scores, guide, 16, neighbours=10), expected)


@pytest.mark.parametrize("kept_offsets", [0, 30, 84])
@pytest.mark.parametrize("values", [900, 1 << 19])
def test_chunks_of_pixels_and_classes_and_computed_weights_give_the_same(monkeypatch, kept_offsets, values):
    image, scores = photo(14, 19), draw(5, 14, 19)
    expected = lposs_plus(scores, image)
    monkeypatch.setattr(pixels, "_WEIGHT_BYTES", 4 * 14 * (19 + 6) * kept_offsets)
    monkeypatch.setattr(pixels, "_CLASS_BYTES", 2 * 4 * pixels._COPIES * (20 * 25 + 6))
    monkeypatch.setitem(solver._VALUES, "cpu", values)
    graph = PixelGraph(image)
    assert sum(map(len, graph._kept)) == {0: 0, 30: 19, 84: 84}[kept_offsets]
    assert graph.classes_at_once == 2
    assert_same(graph.propagate(scores), expected)


def test_classes_of_zeros_stay_zero_and_do_not_disturb_others():
    image, scores, guide = photo(6, 7), draw(3, 6, 7), draw(4, 6, 7)
    expected = lposs_plus(scores, image)
    scores[1] = 0
    result = lposs_plus(scores, image)
    assert not result[1].any()
    torch.testing.assert_close(result[::2], expected[::2])
    assert not lposs(scores.permute(1, 2, 0), guide, 16)[..., 1].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e6, 1e30])
def test_the_length_of_the_guide_has_no_effect(scale):
    scores, guide = draw(5, 5, 2), draw(8, 5, 5)
    torch.testing.assert_close(lposs(scores, guide * scale, 16), lposs(scores, guide, 16), rtol=1e-4, atol=1e-4)


def test_a_converged_class_keeps_its_value_while_others_go_on():
    # Constant on a constant image of one neighborhood: an eigenvector, which one step solves.
    scores = torch.stack([torch.ones(5, 5), draw(5, 5)])
    result = lposs_plus(scores, torch.full((3, 5, 5), 0.5))
    torch.testing.assert_close(result[0], torch.full((5, 5), 20.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(result[1], lposs_plus(scores[1:], torch.full((3, 5, 5), 0.5))[0])


def test_patches_without_neighbors_keep_their_scores():
    guide, scores = draw(4, 3, 4), draw(3, 4, 2)
    guide[:, 1, 2] = 0
    result = lposs(scores, guide, 16)
    # Ten steps nearly solve the system.
    torch.testing.assert_close(result[1, 2], scores[1, 2], rtol=0, atol=0.02)
    assert not torch.allclose(result[0, 0], scores[0, 0], rtol=0, atol=0.1)
    torch.testing.assert_close(lposs(scores, guide, 16, neighbours=1), scores)


def test_pixels_of_very_different_colors_are_not_connected():
    scores = draw(2, 1, 2)
    blue_and_green = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]])
    torch.testing.assert_close(lposs_plus(scores, blue_and_green), scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    scores, guide, image = draw(4, 5, 3).to(dtype), draw(6, 4, 5).to(dtype), photo(4, 5).to(dtype)
    assert torch.equal(lposs(scores, guide, 16), lposs(scores.float(), guide.float(), 16))
    planes = scores.permute(2, 0, 1)
    assert torch.equal(lposs_plus(planes, image), lposs_plus(planes.float(), image.float()))


@pytest.mark.parametrize("factor", [2.0**-110, 2.0**100])
def test_very_small_and_very_large_scores_lose_nothing(factor):
    scores, guide, image = draw(4, 5, 3), draw(6, 4, 5), photo(4, 5)
    assert torch.equal(lposs(scores * factor, guide, 16), lposs(scores, guide, 16) * factor)
    planes = scores.permute(2, 0, 1)
    assert torch.equal(lposs_plus(planes * factor, image), lposs_plus(planes, image) * factor)


def test_very_large_guides_lose_nothing():
    scores, guide = draw(4, 5, 3), draw(6, 4, 5)
    assert_same(lposs(scores, guide * 1e30, 16), lposs(scores, guide, 16))


def test_autocast_has_no_effect():
    scores, guide, image = draw(4, 5, 3), draw(6, 4, 5), photo(4, 5)
    expected = lposs(scores, guide, 16), lposs_plus(scores.permute(2, 0, 1), image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lposs(scores, guide, 16), expected[0])
        assert torch.equal(lposs_plus(scores.permute(2, 0, 1), image), expected[1])


def test_no_classes_give_no_scores():
    assert lposs(draw(2, 3, 0), draw(4, 2, 3), 16).shape == (2, 3, 0)
    assert lposs_plus(draw(0, 2, 3), photo(2, 3)).shape == (0, 2, 3)


def test_memory_of_pixels_is_bounded_whatever_the_classes(monkeypatch):
    height, width = 60, 70
    image, area = photo(height, width), 4 * (height + 7) * (width + 7)
    monkeypatch.setattr(pixels, "_WEIGHT_BYTES", 20 * area)
    monkeypatch.setattr(pixels, "_CLASS_BYTES", 2 * pixels._COPIES * area)
    # Ranges of 1024 pixels.
    monkeypatch.setitem(solver._VALUES, "cpu", 1024 * pixels._FEWEST)
    monkeypatch.setattr(solver, "STEPS", 1)

    def peak(classes):
        scores = draw(classes, height, width)
        return peak_of_tensors(lambda: lposs_plus(scores, image)) - 4 * scores.numel()

    # All weights would be 84 maps; colors and scales are 4. Weights of 13 neighbors are computed at a time.
    limit = (20 + 2 * pixels._COPIES + 4 + 1) * area + 4 * 5 * 13 * 1024
    assert limit / 2 < peak(2) <= limit
    assert limit / 2 < peak(6) <= limit


def test_memory_of_patches_never_holds_all_pairs():
    guide, scores = draw(4, 50, 60), draw(50, 60, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(patches._BLOCK_BYTES, "cpu", 1 << 18)
        patch.setattr(patches, "_COLUMN_BYTES", 1 << 16)
        assert 3000 * 20 * 4 < peak_of_tensors(lambda: lposs(scores, guide, 16, neighbours=20)) < 3000 * 3000 * 4 / 4


NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(3, 4)}, r"scores must have shape \(h, w, Q\).*, got \(3, 4\)"),
        ({"scores": torch.zeros(3, 4, 2, dtype=torch.int64)}, "scores must be a floating-point.*int64"),
        ({"scores": torch.zeros(0, 4, 2), "guide": torch.zeros(5, 0, 4)}, "scores must have shape"),
        ({"scores": torch.full((3, 4, 2), NAN)}, "scores must be finite"),
        ({"scores": [[[1.0]]]}, "scores must be a floating-point tensor.*list"),
        ({"guide": torch.ones(5, 4, 3)}, "guide .*3x4, got 4x3"),
        ({"guide": torch.ones(12, 5)}, "guide must have shape"),
        ({"guide": torch.full((5, 3, 4), INFINITE)}, "guide must be finite"),
        ({"guide": torch.ones(5, 3, 4, device="meta")}, "guide must be on the device of scores, cpu, got meta"),
        ({"patch": 0}, "patch .* got 0"),
        ({"patch": NAN}, "patch .* got nan"),
        ({"patch": "16"}, "patch .* got '16'"),
        ({"patch": True}, "patch .* got True"),
        ({"neighbours": 0}, "neighbours .* at least 1, got 0"),
        ({"neighbours": 2.5}, "neighbours must be an integer .* got 2.5"),
    ],
)
def test_bad_arguments_of_lposs_are_named(changes, message):
    arguments = {"scores": torch.ones(3, 4, 2), "guide": torch.ones(5, 3, 4), "patch": 16, "neighbours": 3}
    lposs(**arguments)
    with pytest.raises(ValueError, match=message):
        lposs(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(3, 4)}, r"scores must have shape \(Q, H, W\).*, got \(3, 4\)"),
        ({"scores": torch.zeros(2, 3, 5)}, "image .*size of scores .*3x5, got 3x4"),
        ({"scores": torch.full((2, 3, 4), -INFINITE)}, "scores must be finite"),
        ({"image": torch.zeros(3, 3, 4, dtype=torch.uint8)}, "image must be a floating-point.*uint8"),
        ({"image": torch.zeros(1, 3, 4)}, r"image must be RGB \(3, H, W\), got \(1, 3, 4\)"),
        ({"image": torch.zeros(1, 3, 3, 4)}, "image must have shape"),
        ({"image": torch.full((3, 3, 4), NAN)}, "image must be finite"),
        ({"image": torch.full((3, 3, 4), 255.0)}, "image must be RGB in 0..1, got values from 255 to 255"),
        ({"image": torch.full((3, 3, 4), -2.0)}, "image must be RGB in 0..1, got values from -2 to -2"),
    ],
)
def test_bad_arguments_of_lposs_plus_are_named(changes, message):
    arguments = {"scores": torch.ones(2, 3, 4), "image": torch.ones(3, 3, 4)}
    lposs_plus(**arguments)
    with pytest.raises(ValueError, match=message):
        lposs_plus(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("graph", "columns", "message"),
    [
        (PatchGraph, torch.zeros(11, 2), "columns must have 12 rows.*3x4.*got 11"),
        (PatchGraph, torch.zeros(3, 4, 2), "columns must have shape"),
        (PatchGraph, torch.full((12, 2), NAN), "columns must be finite"),
        (PixelGraph, torch.zeros(2, 4, 3), "columns .*3x4, got 4x3"),
        (PixelGraph, torch.zeros(12, 2), "columns must have shape"),
        (PixelGraph, torch.full((2, 3, 4), INFINITE), "columns must be finite"),
    ],
)
def test_bad_columns_of_a_graph_are_named(graph, columns, message):
    made = PatchGraph(torch.ones(5, 3, 4), 16) if graph is PatchGraph else PixelGraph(torch.ones(3, 3, 4))
    with pytest.raises(ValueError, match=message):
        made.propagate(columns)


@pytest.mark.parametrize("make", [lambda x: PatchGraph(x, 16), PixelGraph], ids=["patches", "pixels"])
def test_a_graph_of_nan_is_refused(make):
    with pytest.raises(ValueError, match="(guide|image) must be finite"):
        make(torch.full((3, 3, 4), NAN))
