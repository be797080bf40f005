"""On a GPU, propagation waits once, for the check of its inputs. On the pretended device of :mod:`pretended_cuda`."""

import pytest
import torch

from pretended_cuda import PretendedCuda
from spar_d2.refine import PatchGraph, PixelGraph, best_classes, lposs, lposs_plus


def draw(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.fixture
def gpu():
    with PretendedCuda() as gpu:
        yield gpu


@pytest.mark.parametrize("autocast", [False, True])
def test_one_wait_for_each_refinement(gpu, autocast):
    scores, guide, image = draw(4, 5, 3), draw(6, 4, 5), draw(3, 4, 5)
    expected = lposs(scores, guide, 16), lposs_plus(scores.permute(2, 0, 1), image)
    scores, guide, image = (tensor.to("cuda") for tensor in (scores, guide, image))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        gpu.reset()
        patches = lposs(scores, guide, 16)
        assert gpu.waits_in("spar_d2") == 1, gpu.report()
        gpu.reset()
        pixels = lposs_plus(scores.permute(2, 0, 1), image)
        assert gpu.waits_in("spar_d2") == 1, gpu.report()
    for result, reference in zip((patches, pixels), expected):
        assert result.is_cuda
        torch.testing.assert_close(result.cpu(), reference, rtol=1e-5, atol=1e-5)


def test_no_wait_without_checks(gpu):
    scores, guide, image = (tensor.to("cuda") for tensor in (draw(3, 4, 5), draw(6, 4, 5), draw(3, 4, 5)))
    allowed = torch.ones(3, dtype=torch.bool, device="cuda")
    gpu.reset()
    PatchGraph(guide, 16, check=False).propagate(scores.flatten(1).T, check=False)
    graph = PixelGraph(image, check=False)
    best, weak = best_classes((graph.propagate(part, check=False) for part in scores.split(2)), 40.0, 0.4, allowed)
    assert gpu.waits_in("spar_d2") == 0, gpu.report()
    assert best.is_cuda and weak.is_cuda
