"""The kernel for labels, as far as a machine without a GPU can run it, and its fallback.

Run as a script, with TRITON_INTERPRET=1, this file compares the interpreted kernel with bands.
"""

import importlib.util
import itertools
import json
import logging
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretended_cuda import PretendedCuda
from spar_d2.modeling import banded_upsampling as bands
from spar_d2.modeling import best_query, segment_features
from spar_d2.modeling.banded_upsampling import Resampling, ScoreMap, UpsampledScores
from spar_d2.modeling.postprocessing import segment_scores

NO_TRITON = "needs Triton, which comes with PyTorch for Linux"
# Scores this close are equal up to rounding.
NEAR = 1e-5
SEEDS = range(6)
# Not many more than a thread's accumulators need, so that 8 groups of threads or more share a processor; and what may
# go to memory outside of the loops.
# Of a thread, which can have 255: in the first pass, and in the second, which also knows queries that are left out.
REGISTERS, MOST_REGISTERS = 128, 224


def random_case(seed):
    """Maps of one image, (H, W) of the result, scale, threshold and allowed queries."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    queries = (1, 3, 64, 66, 131)[seed % 5]
    size = rng.randint(1, 9), rng.randint(1, 12)
    maps = []
    for _ in range((1, 1, 2)[seed % 3]):
        padded = size[0] + 9 * rng.random(), size[1] + 20 * rng.random()
        grid = rng.randint(1, 4), rng.randint(1, 5)
        maps.append(ScoreMap(torch.randn(*grid, queries), rng.choice([None, padded]), rng.random() < 0.5))
    return maps, size, rng.choice([1.0, 5.0]), (0.0, 0.3)[seed % 2], torch.rand(queries) < 0.5


def exact_case(name):
    """Scores whose interpolation is exact, so that equal ones are equal however they are computed."""
    torch.manual_seed(0)
    scores = torch.randint(0, 2, (2, 3, 70)).float()
    allowed = torch.arange(70) % 3 != 1
    if name == "not a number":
        scores[1, 1] = torch.nan
    if name == "none allowed":
        allowed[:] = False
    return [ScoreMap(scores, (8, 12))], (7, 11), 2.0, 0.0 if name == "ties" else 0.02, allowed


EXACT = ("ties", "ties, threshold", "not a number", "none allowed")


def in_bands(upsampled, scale, threshold, allowed):
    """Best and weak by bands, and the same where only some queries are allowed."""
    first = best_query._in_bands(upsampled, scale, threshold)
    second = tuple(tensor.clone() for tensor in first)
    best_query._replace_in_bands(upsampled, scale, threshold, allowed, *second, removed=first[0].numel())
    return first, second


def differences(case):
    """Pixels where the kernel's best query, or whether it is weak, differ, and how many of them without being near."""
    from spar_d2.modeling.best_query_triton import launch

    maps, size, scale, threshold, allowed = case
    upsampled = UpsampledScores(maps, size)
    expected, expected_again = in_bands(upsampled, scale, threshold, allowed)
    found = launch(upsampled, scale, threshold), launch(upsampled, scale, threshold, allowed, *expected)
    scores = torch.cat([part for _, part in UpsampledScores(maps, size).bands()])
    probabilities = (scale * scores).softmax(-1)
    different = unequal = 0
    for (best, weak), (other, other_weak) in zip((expected, expected_again), found):
        values = scores.gather(-1, torch.stack([best, other], -1))
        apart = (best != other) & ~(values.diff(dim=-1)[..., 0].abs() <= NEAR)
        if threshold:
            chosen = probabilities.gather(-1, best[..., None])[..., 0]
            apart |= (weak != other_weak) & ~((chosen - threshold).abs() <= NEAR)
            different += int((weak != other_weak).sum())
        different, unequal = different + int((best != other).sum()), unequal + int(apart.sum())
    return different, unequal


def main():
    assert "spar_d2.modeling.best_query_triton" not in sys.modules, "imported before it is needed"
    results = {f"random {seed}": differences(random_case(seed)) for seed in SEEDS}
    results |= {name: differences(exact_case(name)) for name in EXACT}
    print(json.dumps(results))


@pytest.mark.slow
def test_the_kernel_equals_the_banded_computation():
    """Also for exactly equal scores: the first is taken. One process interprets all cases."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip(NO_TRITON)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", str(Path(__file__))]
    found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert list(found) == [*(f"random {seed}" for seed in SEEDS), *EXACT]
    for name, (different, unequal) in found.items():
        assert unequal == 0 and different <= (0 if name in EXACT else 3), name


def compiled(capability, probabilities, again, several, cache):
    """The kernel as a GPU would run it, compiled with the types that a launch has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spar_d2.modeling import best_query_triton as kernel

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    names = kernel.best_query_kernel.arg_names
    pointers = {"scores": "*fp32", "above": "*i64", "below": "*i64", "down": "*fp32", "across": "*fp32"}
    pointers |= {"allowed": "*i1", "old_best": "*i64", "old_weak": "*i1", "best": "*i64", "weak": "*i1"}
    constants = {"PROBABILITIES": probabilities, "AGAIN": again, "NEVER": kernel._NEVER, "QUERIES": 128}
    constants |= {"ROWS": kernel.TILE[0], "PIXELS": kernel.TILE[1]} | ({} if several else {"maps": 1})
    numbers = dict.fromkeys(("maps", "height", "width", "pairs"), "i32") | {"scale": "fp32", "threshold": "fp32"}
    types = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        kernel.best_query_kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 2})
    ptx = result.asm["ptx"]
    (cache / "kernel.ptx").write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [assembler, "-v", f"--gpu-name=sm_{capability}{'a' * (capability == 90)}"]
    command += [cache / "kernel.ptx", "-o", cache / "kernel.cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return ptx, report


# All of them for an H100, two for an A100.
COMPILED = [(90, *flags) for flags in itertools.product((False, True), (False, True), (False, True))]
COMPILED += [(80, False, False, False), (80, True, True, True)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=NO_TRITON)
@pytest.mark.parametrize(("capability", "probabilities", "again", "several"), COMPILED)
def test_kernel_compiles_and_stays_in_registers(capability, probabilities, again, several, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, report = compiled(capability, probabilities, again, several, tmp_path)
    assert ".local" not in ptx, "an array in memory"
    assert "ld.global.v2.b32" in ptx, "scores are loaded one by one"
    allowed = MOST_REGISTERS if again else REGISTERS
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= allowed, report
    assert int(re.search(r"(\d+) bytes spill stores", report)[1]) == 0, report


@pytest.mark.parametrize("mirrored", [False, True])
def test_cells_around_a_part_are_all_it_needs(mirrored):
    rng = random.Random(0)
    for _ in range(300):
        cells, wanted = rng.randint(1, 40), rng.randint(1, 300)
        along = Resampling(cells, wanted + rng.choice([0, 0.3, 700]), wanted, mirrored, torch.device("cpu"))
        start = rng.randrange(wanted)
        part = slice(start, rng.randint(start + 1, wanted))
        first, last = along.around(part)
        assert 0 <= first <= int(along.before[part].min()) and int(along.after[part].max()) <= last < cells
        assert last - first <= int(along.after[part].max()) - int(along.before[part].min()) + 4


@pytest.fixture
def small_bands(monkeypatch):
    monkeypatch.setattr(bands, "_BAND_BYTES", {"cpu": 1 << 12, "other": 1 << 12})


def several_maps(device):
    torch.manual_seed(0)
    first, second = torch.randn(5, 6, 20).to(device), torch.randn(3, 7, 20).half().to(device)
    return [ScoreMap(first, (50.5, 60.0)), ScoreMap(second, (50.0, 49.3), mirrored=True)]


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", [(0.0, None), (0.3, None), (0.0, 0.05), (0.3, 0.05)])
@pytest.mark.parametrize("fused", ["0", "1"])
def test_several_maps_on_a_gpu(small_bands, monkeypatch, fused, thresholds):
    """The same labels as on a CPU, with and without the operator, and one wait at most."""
    monkeypatch.setenv(best_query.SWITCH, fused)
    classes = torch.tensor([7, 0, 3, 90, 3] * 4)
    expected = segment_scores(several_maps("cpu"), classes, (50, 48), 2.0, *thresholds)
    with PretendedCuda() as gpu:
        maps, on_device = several_maps("cuda"), classes.to("cuda")
        gpu.reset()
        labels = segment_scores(maps, on_device, (50, 48), 2.0, *thresholds)
        operators = {name for name, _ in gpu.launches}
        assert sum(gpu.waits.values()) <= (thresholds[1] is not None and fused == "0")
        assert torch.equal(labels.cpu(), expected)
    assert ("best_query" in operators) == (fused == "1" and best_query._operator is not None)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=NO_TRITON)
def test_where_triton_fails_bands_are_used_and_one_warning_says_so(monkeypatch, caplog):
    """Triton really fails here: the tensors are in the memory of the CPU."""
    monkeypatch.setattr(best_query, "_unusable", False)
    monkeypatch.setattr(best_query, "_operator", best_query._operator_on_cuda)
    monkeypatch.setenv(best_query.SWITCH, "1")
    arguments = [torch.randn(8, 3, 4), F.normalize(torch.randn(9, 8), dim=1), torch.arange(9)]
    expected = segment_features(*arguments, (30, 40), None, 40.0, 0.1, 0.1)
    with PretendedCuda(), caplog.at_level(logging.WARNING):
        labels = segment_features(*(tensor.to("cuda") for tensor in arguments), (30, 40), None, 40.0, 0.1, 0.1)
        assert torch.equal(labels.cpu(), expected)
    (message,) = [record.getMessage() for record in caplog.records if record.name == best_query.__name__]
    assert re.search(f"row chunks.*{best_query.SWITCH}=0.*Error", message)


@pytest.mark.slow
@pytest.mark.skipif(best_query._operator is None, reason=NO_TRITON + ", and PyTorch 2.4")
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_the_operator_matches_its_schema(threshold):
    scores = [torch.randn(3, 4, 6), torch.randn(2, 2, 6)]
    given = (scores, [9.0, 11.0, 9.5, 10.0], [False, True], 9, 10, 5.0, threshold)
    checks = ("test_schema", "test_faketensor")
    best, weak = best_query._operator(*given, None, None, None)
    torch.library.opcheck(best_query._operator, (*given, None, None, None), test_utils=checks)
    torch.library.opcheck(best_query._operator, (*given, torch.rand(6) < 0.5, best, weak), test_utils=checks)


if __name__ == "__main__":
    main()
