"""The library forwards that encoders are compared with, and the table."""

import math

import pytest
import torch

from benchmarks import encoders as benchmark
from benchmarks.encoders import TABLE, Measurement, library_forward, measure_encoder
from reference import STAND_IN, example_encoder
from spar_d2.encoders import FAMILIES, DenseEncoder

GRID = (4, 7)
TINY = "vit_nano_patch8_dinov3"
CPU = torch.device("cpu")
FULL = Measurement("ViT", "float32", 512, 1024, 2 * 10**12, 4.0, 5.0, 3 * 2**20, 6 * 2**20)
BARE = Measurement("ViT", "float32", 512, 1024, 2 * 10**12, 4.0, None, None, None)


def image(encoder: DenseEncoder, grid: tuple[int, int] = GRID) -> torch.Tensor:
    sides = [cells * encoder.patch_size for cells in grid]
    return torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(1))


def as_map(tokens: torch.Tensor, grid: tuple[int, int] = GRID) -> torch.Tensor:
    """The last h * w of the tokens (1, N, C) as (1, C, h, w)."""
    return tokens[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_has_a_library_forward_that_leaves_the_encoder_alone(family):
    encoder = example_encoder(family)
    x = image(encoder)
    before, state = encoder(x), {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    result = library_forward(encoder, GRID)(x)
    assert result.isfinite().all() and len(result) == 1
    assert torch.equal(encoder(x), before)
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in encoder.state_dict().items())


@torch.no_grad()
def test_the_pooled_vector_at_the_native_size_equals_that_of_open_clip():
    encoder = example_encoder("open_clip ViT")
    assert library_forward(encoder, GRID)(image(encoder)).shape == (1, encoder.embed_dim)
    native = (encoder.native_size // encoder.patch_size,) * 2
    x = image(encoder, native)
    torch.testing.assert_close(library_forward(encoder, native)(x), encoder.visual(x))


@torch.no_grad()
def test_dense_features_of_siglip_are_the_encoders_at_the_native_size():
    """At others, timm resamples positions with antialiasing."""
    encoder = example_encoder("SigLIP")
    native = (encoder.native_size // encoder.patch_size,) * 2
    x = image(encoder, native)
    dense = as_map(library_forward(encoder, native)(x), native)
    torch.testing.assert_close(dense, encoder(x), rtol=1e-4, atol=1e-5)
    assert library_forward(encoder, GRID)(image(encoder)).shape == (1, math.prod(GRID), encoder.embed_dim)


@pytest.mark.parametrize("family", ["DINOv3", "DINOv3.txt", "timm ViT", "open_clip timm ViT"])
@torch.no_grad()
def test_dense_features_are_the_encoders(family):
    encoder = example_encoder(family)
    x = image(encoder)
    torch.testing.assert_close(as_map(library_forward(encoder, GRID)(x)), encoder(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_family_without_library_forward_is_measured_alone(monkeypatch):
    assert library_forward.dispatch(DenseEncoder)(None, GRID) is None
    monkeypatch.setattr(benchmark, "library_forward", library_forward.dispatch(DenseEncoder))
    (measurement,) = measure_encoder(TINY, [24], ["float32"], CPU, repeats=1)
    assert measurement.seconds > 0 and measurement.library_seconds is None and measurement.library_peak is None
    assert (measurement.cells, measurement.flops > 0) == (9, True)


@pytest.mark.slow
def test_a_library_forward_that_does_not_fit_is_left_out(monkeypatch):
    def fail(message: str):
        def forward(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(message)

        return lambda encoder, grid: forward

    monkeypatch.setattr(benchmark, "library_forward", fail("DefaultCPUAllocator: can't allocate memory"))
    (measurement,) = measure_encoder(TINY, [24], ["float32"], CPU, repeats=1)
    assert measurement.library_seconds is None
    monkeypatch.setattr(benchmark, "library_forward", fail("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        list(measure_encoder(TINY, [24], ["float32"], CPU, repeats=1))


@pytest.mark.slow
def test_library_computes_in_the_same_precision_on_whole_patches(monkeypatch):
    seen = []

    def record(x: torch.Tensor) -> torch.Tensor:
        seen.append(((x @ x.transpose(-1, -2)).dtype, tuple(x.shape[-2:]), torch.is_grad_enabled()))
        return x

    monkeypatch.setattr(benchmark, "library_forward", lambda encoder, grid: record)
    measurements = list(measure_encoder(TINY, [20, 24], ["float32", "bfloat16"], CPU, repeats=1))
    assert [(m.precision, m.size) for m in measurements] == [
        ("float32", 20), ("float32", 24), ("bfloat16", 20), ("bfloat16", 24)
    ]  # fmt: skip
    assert set(seen) == {(dtype, (24, 24), False) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.slow
def test_dinotxt_is_built_from_a_clone(monkeypatch):
    monkeypatch.setattr(benchmark, "library_forward", library_forward.dispatch(DenseEncoder))
    name = FAMILIES["DINOv3.txt"].names()[0]
    (measurement,) = measure_encoder(name, [32], ["float32"], CPU, repeats=1, dinov3_repo=str(STAND_IN))
    assert (measurement.encoder, measurement.cells) == (name, 4)


def cells(measurement: Measurement) -> dict[str, str]:
    names, values = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (TABLE.head[0], TABLE.row(measurement))
    )
    return dict(zip(names, values, strict=True))


def test_row():
    assert cells(FULL) == {
        "encoder": "ViT",
        "precision": "float32",
        "size": "512",
        "tokens": "1024",
        "GFLOP": "2000",
        "ms": "4000",
        "library ms": "5000",
        "ratio": "0.800",
        "TFLOP/s": "0.5",
        "peak MiB": "3",
        "library peak MiB": "6",
        "KiB per token": "3",
    }
    assert TABLE.head[1].count("|") == TABLE.head[0].count("|")


def test_missing_results_are_a_dash_with_a_reason():
    row = cells(BARE)
    dashes = {name for name, value in row.items() if value == "-"}
    assert dashes == set(row) - {"encoder", "precision", "size", "tokens", "GFLOP", "ms", "TFLOP/s"}
    extra = set(TABLE.notes([FULL, BARE])) - set(TABLE.notes([FULL]))
    assert {word for note in extra for word in ("library", "peak") if f"under {word}" in note} == {"library", "peak"}
