"""Measurements of known memory and known calls."""

import os

import pytest
import torch

from benchmarks.measure import describe_machine, median_seconds, peak_bytes

MIB = 2**20
CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))),
]


def allocate(mib: int, device: torch.device) -> torch.Tensor:
    # Filled: memory that nobody has written to is not there yet.
    return torch.ones(mib * MIB // 4, device=device)


def peak_of(function, device: torch.device) -> float:
    """In MiB."""
    if (peak := peak_bytes(function, device)) is None:
        pytest.skip("the system does not tell the peak of memory")
    return peak / MIB


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_includes_freed_memory(device):
    device = torch.device(device)
    held = allocate(64, device)
    # Memory that was freed before, in small pieces and in one, is counted when it is allocated again.
    for _ in range(3):
        assert peak_of(lambda: allocate(64, device), device) == pytest.approx(64, rel=0.1)
        assert peak_of(lambda: [allocate(1, device) for _ in range(48)], device) == pytest.approx(48, rel=0.1)
    assert peak_of(lambda: held.sum(), device) < 6


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_is_the_memory_in_use_at_one_time(device):
    device = torch.device(device)

    def one_after_the_other() -> None:
        for _ in range(4):
            allocate(40, device)

    # The C library may take one of the blocks from elsewhere while it keeps the one before.
    assert min(peak_of(one_after_the_other, device) for _ in range(3)) == pytest.approx(40, rel=0.1)


def test_peak_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.measure._PROCESS", tmp_path / "none")
    assert peak_bytes(lambda: pytest.fail("called for nothing"), CPU) is None


def test_functions_take_turns():
    calls = []
    seconds = median_seconds([lambda: calls.append("ours"), lambda: calls.append("library")], 3, CPU)
    assert calls == ["ours", "library"] * 3
    assert len(seconds) == 2 and min(seconds) > 0


def test_after_the_limit_no_function_is_called_again():
    calls = []
    seconds = median_seconds([lambda: calls.append("ours"), lambda: calls.append("library")], 3, CPU, limit=0)
    assert calls == ["ours", "library"] and len(seconds) == 2


def test_machine_is_named():
    assert describe_machine(CPU).endswith(f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")
    assert len(describe_machine(CPU).split(",")[0]) > 2 or not os.path.exists("/proc/cpuinfo")
