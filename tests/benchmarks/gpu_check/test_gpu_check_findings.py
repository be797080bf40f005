"""Problems that the GPU check finds: plain attention, wrong labels, NaN and waits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check import checks
from benchmarks.gpu_check.features import SeenAttention
from benchmarks.gpu_check.labeled_image import random_image
from benchmarks.gpu_check.waits import HostWaits


def test_plain_attention_is_seen():
    x = torch.randn(1, 2, 8, 16)
    for backend, expected in ((SDPBackend.MATH, {"math"}), (SDPBackend.FLASH_ATTENTION, {"flash_attention_for_cpu"})):
        with sdpa_kernel(backend), SeenAttention() as seen:
            F.scaled_dot_product_attention(x, x, x)
        assert seen.kernels == expected


def test_nan_does_not_pass():
    ones = torch.ones(1, 4, 2, 2)
    assert checks.compare("", "", ones, ones, 1e-9).passed
    assert not checks.compare("", "", ones * torch.nan, ones, 1e9).passed
    empty = ones.clone()
    empty[..., 0] = 0
    assert checks.compare("", "", empty, empty, 1e-9).cosine == pytest.approx(1)


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_labels_that_are_no_tie_are_counted(probability):
    image = random_image(20, (65, 50), views=2)
    expected = image.labels(probability, None)
    assert image.disagreement(expected, expected, probability) == (0, 0)
    wrong = expected.clone()
    wrong[3:5, 7] = (wrong[3:5, 7] + 3) % 10
    assert image.disagreement(expected, wrong, probability) == (2, 2)


def test_waits_are_counted_by_place():
    with HostWaits(torch.device("cpu")) as waits:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
    ((place, count),) = waits.places.items()
    assert place.startswith(__file__) and count == 2
