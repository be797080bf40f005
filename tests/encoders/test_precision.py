"""Weights in bfloat16, frozen blocks cast once, cached positions, and float32 inside autocast."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from reference import example_encoder
from spar_d2.encoders import FAMILIES, set_trainable
from spar_d2.encoders.grids import RecentGrids
from spar_d2.encoders.precision import full_float32, resolve_precision


@pytest.fixture(params=sorted(FAMILIES))
def encoder(request):
    torch.manual_seed(0)
    return example_encoder(request.param)


def nbytes(encoder) -> int:
    return sum(p.nbytes for p in encoder.parameters())


@torch.no_grad()
def test_a_frozen_bfloat16_encoder_has_half_the_weights_and_stays_close(encoder):
    x = torch.randn(2, 3, 70, 100)
    expected, before = encoder(x), nbytes(encoder)
    found = encoder.accelerate("bfloat16").freeze()(x)
    assert nbytes(encoder) == before // 2
    assert not any(p.requires_grad for p in encoder.parameters())
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found, expected, dim=1).min() > 0.99
    # Autocast does not change the precision of blocks with cast weights.
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(encoder(x), found)
    with pytest.raises(ValueError, match=r"must be bfloat16.*got 'float32'"):
        encoder.accelerate("float32")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_freezing_keeps_other_weights(encoder, precision):
    before = copy.deepcopy(encoder.state_dict())
    encoder.accelerate(precision).freeze()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_frozen_blocks_are_cast_for_a_while_and_weights_stay(encoder):
    encoder.accelerate("bfloat16")
    set_trainable(encoder, "last_blocks:1")
    encoder.train()
    x, before = torch.randn(1, 3, 70, 100), copy.deepcopy(encoder.state_dict())
    # Squares of layer-normalized features have a constant sum, so their gradient is rounding noise.
    with torch.no_grad():
        weights = torch.randn_like(encoder(x))

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        (encoder(x) * weights).mean().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    usual, seen = gradients(), []
    frozen = encoder.blocks[0]
    with encoder.frozen_blocks_cast():
        frozen.register_forward_pre_hook(lambda *_: seen.append("float32 weights"))
        own = gradients()
    assert not seen, "the frozen block itself was run"
    assert len(own) == len(usual)
    for found, expected in zip(own, usual):
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(gradients(), usual)), "afterwards all is as before"


def test_no_block_is_cast_in_float32(encoder):
    set_trainable(encoder, "last_blocks:1")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), encoder.frozen_blocks_cast():
        inside = encoder(x)
    with torch.no_grad():
        assert torch.equal(encoder(x), inside)


def test_positions_cached_in_inference_mode_can_be_used_in_training(encoder):
    x = torch.randn(1, 3, 96, 48)
    with torch.inference_mode():
        expected = encoder(x.clone())
    found = encoder(x)
    torch.testing.assert_close(found, expected.clone())
    found.square().mean().backward()


def test_positions_of_a_grid_are_computed_once_for_each_precision(encoder, monkeypatch):
    made = []
    get = RecentGrids.get

    def counting(self, grid, like, make):
        return get(self, grid, like, lambda: made.append(grid) or make())

    monkeypatch.setattr(RecentGrids, "get", counting)
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        for _ in range(3):
            encoder(x)
        assert len(made) == len({*made})
        kinds = len(made)
        first = encoder(x)
        encoder.accelerate("bfloat16")(x)
        assert torch.equal(encoder.accelerate("float32")(x), first)
    assert len(made) == 2 * kinds <= 4


def test_only_the_last_few_grids_are_cached():
    grids, made = RecentGrids(), []
    like = torch.zeros(1)
    for number in [*range(20), 19, 13, 0]:
        grids.get((number, 1), like, lambda number=number: (made.append(number), torch.full((1,), float(number)))[1:])
    assert made == [*range(20), 0]
    for other in (copy.deepcopy(grids), pickle.loads(pickle.dumps(grids))):
        other.get((0, 1), like, lambda: (made.append("anew"), like)[1:])
    assert made[-2:] == ["anew", "anew"]


@pytest.mark.parametrize(
    ("precision", "device", "expected"), [("auto", "cpu", "float32"), ("float16", "cpu", "float16")]
)
def test_the_precision_of_a_device(precision, device, expected):
    assert resolve_precision(precision, device) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_is_bfloat16_on_gpus_that_compute_in_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_precision("auto", "cuda:0") == expected


def test_full_float32_switches_autocast_off_and_on_again():
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with full_float32(a.device):
            assert torch.equal(a @ b, torch.mm(a, b))
            assert (a @ b).dtype == torch.float32
        assert (a @ b).dtype == torch.bfloat16


def test_full_float32_switches_tf32_off_on_gpus_and_on_again(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())  # there is no GPU to ask about autocast
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(ZeroDivisionError), full_float32(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
