"""Counted operations against a formula, and against PyTorch's own counter."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import count_flops
from reference import example_encoder
from spar_d2.encoders import FAMILIES


def test_formula():
    encoder = example_encoder("SigLIP")
    cells, patch, width, depth = 600, 16, 96, len(encoder.blocks)
    embedding = cells * 3 * patch**2 * width
    # Queries, keys, values, output, MLP of four times the width; Q K^T and its product with V.
    block = cells * (3 + 1 + 8) * width**2 + 2 * cells**2 * width
    pooling = cells * (1 + 1 + 8) * width**2
    assert count_flops(encoder, [cells]) == [2 * (embedding + depth * block + pooling)]


def resampling(encoder, height, width):
    """Operations on a position table, first along its columns, then along its rows."""
    native = encoder.native_size // encoder.patch_size
    if "posembed" not in encoder.parts or (height, width) == (native, native):
        return 0
    return 2 * encoder.width * (height * native * native + height * width * native)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_counter_of_pytorch_at_other_sizes(family):
    encoder = example_encoder(family)
    before = copy.deepcopy(encoder.state_dict())
    grids = [(1, 1), (4, 4), (9, 14)]
    expected = []
    for height, width in grids:
        x = torch.zeros(1, 3, height * encoder.patch_size, width * encoder.patch_size)
        # Not all versions of PyTorch count the fused attention of CPUs.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder(x)
        expected.append(counter.get_total_flops() - resampling(encoder, height, width))
    cells = [height * width for height, width in grids]
    assert count_flops(encoder, cells) == expected
    assert count_flops(encoder.accelerate("bfloat16", compile=True), cells) == expected
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
