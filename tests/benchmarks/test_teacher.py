"""The straightforward implementation of the teacher, measurements of both, and the table."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import teacher as benchmark
from benchmarks.teacher import TABLE, Measurement, dense_forward, measure_teacher, straightforward_features
from reference import example_encoder
from spar_d2.encoders import FAMILIES, DenseEncoder
from spar_d2.teacher import SlidingWindowTeacher

TINY = "vit_nano_patch8_dinov3"
CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))),
]
PARTIAL = Measurement(
    encoder="ViT",
    precision="bfloat16",
    width=2048,
    height=1024,
    planned=2695,
    windows=64,
    seconds={"ours": 4.0, "straightforward": 8.0, "autocast": 6.0},
    peaks={"ours": 3 * 2**20, "straightforward": 6 * 2**20},
    difference=0.02,
    deviation=0.5,
)
BARE = Measurement("ViT", "float32", 2048, 1024, 2695, 2695, seconds={"ours": 5.39}, peaks={"ours": None})


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.bytes = max([self.bytes, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        return result


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def straightforward(encoder: DenseEncoder, teacher: SlidingWindowTeacher, x: torch.Tensor, **options) -> torch.Tensor:
    forward = dense_forward(encoder, encoder.grid(teacher.window, teacher.window))
    return straightforward_features(forward, x, teacher.plan(*x.shape[-2:]), **options)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(90, 130), (128, 50)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_target_is_the_teachers(family, size):
    encoder, x = example_encoder(family), image(*size)
    teacher = SlidingWindowTeacher(encoder, stride=24, batch_size=5)
    expected = teacher(x)
    found = straightforward(encoder, teacher, x, batch_size=3)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_share_of_the_first_windows_is_the_teachers():
    encoder, x = example_encoder("SigLIP"), image(90, 130)
    teacher = SlidingWindowTeacher(encoder, stride=24)
    picks = torch.arange(5)[None]
    expected = teacher.encode_windows(x, picks, torch.ones(1, 5)).weighted_sum
    found = straightforward(encoder, teacher, x, windows=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(found, straightforward(encoder, teacher, x), atol=1e-2)


@pytest.mark.slow
@torch.no_grad()
def test_memory_of_ours_does_not_grow_with_the_windows():
    encoder = example_encoder("SigLIP")
    x, batches = image(200, 300), []
    teacher = SlidingWindowTeacher(encoder, stride=8, batch_size=4)
    teacher.encoder.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))

    def largest(call, windows: int) -> int:
        with LargestTensor() as seen:
            call(windows)
        return seen.bytes

    def ours(windows: int) -> None:
        teacher.encode_windows(x, torch.arange(windows)[None], torch.ones(1, windows))

    others = functools.partial(straightforward, encoder, teacher, x)
    assert largest(ours, 8) == largest(ours, 80)
    assert max(batches) == 4 and sum(batches) == 88
    assert largest(lambda windows: others(windows=windows), 80) >= 80 * 3 * teacher.window**2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_measurements(device):
    sizes = [(100, 90), (40, 30)]
    full, small, half, _ = measure_teacher(TINY, sizes, ["float32", "bfloat16"], torch.device(device), repeats=1)
    assert (full.encoder, full.precision, full.width, full.height) == (TINY, "float32", 100, 90)
    assert (full.planned, full.windows, small.planned, small.windows) == (9, 9, 1, 1)
    assert list(full.seconds) == ["ours", "straightforward"] and half.precision == "bfloat16"
    assert list(half.seconds) == ["ours", "straightforward", "autocast"] and min(half.seconds.values()) > 0
    assert list(half.peaks) == ["ours", "straightforward"]
    assert full.difference < 1e-4 < half.difference < half.deviation


def test_only_the_first_windows_are_encoded(monkeypatch):
    seen = []

    def counting(encoder, grid):
        forward = dense_forward(encoder, grid)
        return lambda x: seen.append(len(x)) or forward(x)

    monkeypatch.setattr(benchmark, "dense_forward", counting)
    options = {"stride": 10, "baseline_batch_size": 3, "windows": 5, "repeats": 1}
    (found,) = measure_teacher(TINY, [(100, 90)], ["float32"], CPU, **options)
    assert (found.planned, found.windows) == (25, 5)
    assert found.difference < 1e-4 < found.deviation
    assert seen[:2] == [3, 2] and sum(seen) % 5 == 0


@pytest.mark.slow
@pytest.mark.parametrize("why", ["no forward", "no room"])
def test_without_a_straightforward_way(monkeypatch, why):
    def no_room(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(benchmark, "dense_forward", lambda encoder, grid: None if why == "no forward" else no_room)
    (found,) = measure_teacher(TINY, [(64, 64)], ["bfloat16"], CPU, repeats=1)
    assert list(found.seconds) == list(found.peaks) == ["ours"] and found.difference is None


def test_a_family_without_library_forward_has_no_dense_one(monkeypatch):
    monkeypatch.setattr(benchmark, "library_forward", lambda encoder, grid: None)
    assert dense_forward.dispatch(DenseEncoder)(None, (4, 4)) is None


def cells(measurement: Measurement) -> dict[str, str]:
    names, values = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (TABLE.head[0], TABLE.row(measurement))
    )
    return dict(zip(names, values, strict=True))


def test_row():
    assert cells(PARTIAL) == {
        "encoder": "ViT",
        "precision": "bfloat16",
        "size": "2048x1024",
        "windows": "64 of 2695",
        "windows/s": "16",
        "straightforward windows/s": "8",
        "ratio": "2.000",
        "autocast ratio": "1.500",
        "s per image": "168",
        "peak MiB": "3",
        "straightforward peak MiB": "6",
        "difference": "2.0e-02",
        "difference / std": "4.0e-02",
    }


def test_missing_results_are_a_dash_with_a_reason():
    row = cells(BARE)
    known = {name for name, value in row.items() if value != "-"}
    assert known == {"encoder", "precision", "size", "windows", "windows/s", "s per image"}
    assert row["windows"] == "2695" and row["s per image"] == "5.39"
    notes = "\n".join(TABLE.notes([BARE]))
    assert '"-" under straightforward' in notes and '"-" under peak' in notes and "extrapolated" not in notes
    notes = "\n".join(TABLE.notes([PARTIAL]))
    assert '"-"' not in notes and "extrapolated" in notes
