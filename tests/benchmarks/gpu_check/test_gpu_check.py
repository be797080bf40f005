"""The check of a GPU, tried on a CPU: every part once, as small as it can be."""

from __future__ import annotations

import _thread
import dataclasses
import functools
import json
import re
import shutil
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

import processes
from benchmarks.gpu_check import checks, demo, parts, report, torchrun
from benchmarks.gpu_check.__main__ import run_part
from benchmarks.gpu_check.parts import PARTS, Part, find
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runner import Outcome, Runner
from benchmarks.gpu_check.settings import small
from pretended_cuda import PretendedCuda
from spar_d2.encoders import FAMILIES, compilation

CPU = torch.device("cpu")
# Titles of the tables of each part, and names of their first columns.
TABLES = {
    "features": {"Encoders": "what", "Attention": "what"},
    "targets": {"Teacher": "what", "Reproducibility": "what", "Gradients": "what"},
    "labels": {"Kernel for labels": "what", "Labels": "compared"},
    "compiled": {"Compiled blocks": "what"},
    "panoptic": {"MaskTransformer": "what", "Panoptic models": "model", "Panoptic losses": "what"},
    "speed-encoders": {"Single passes": "encoder"},
    "speed-teacher": {"Teacher, stride 24, and student": "encoder"},
    "speed-labels": {"From features of vit_nano_patch8_dinov3 to labels": "words", "Semantic evaluator": "size"},
    "speed-refinement": {"Refinement": "step"},
    "distillation": {"Distillation, 1 loading processes": "encoder"},
    "demo": {"The demo": "method", "Scores of the demo": "what"},
    "torchrun": {torchrun.TITLE: "what", "Gradients in a group of processes": "what"},
}
# Parts that start processes, and those that take more than a second.
PROCESSES = ("demo", "torchrun")
SLOW = [name for name in TABLES if name not in (*PROCESSES, "compiled", "labels")]


@pytest.fixture(scope="module")
def tables_of(tmp_path_factory):
    """The tables of a part, which runs once."""

    @functools.cache
    def tables(name: str) -> dict:
        # The windows of the model are large, and those of the examples of all families are small.
        settings = dataclasses.replace(small(CPU), models=()) if name == "targets" else small(CPU)
        return check_record(run_part(name, tmp_path_factory.mktemp(name), settings))

    return tables


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def check_record(record: Record) -> dict:
    """Check the record of a part, and return its tables."""
    found = json.loads(record.path.read_text())
    assert found["finished"] and found["failed"] == record.failed == []
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["timm"]
    assert found["date"].startswith("20") and found["seconds"] >= 0
    expected = TABLES[found["part"]]
    assert list(found["tables"]) == list(expected)
    for title, table in found["tables"].items():
        head = cells(table["head"][0])
        assert head[0] == expected[title]
        assert len(table["rows"]) == len(table["values"]) > 0
        assert all(len(cells(row)) == len(head) and "FAILED" not in row for row in table["rows"])
    return found["tables"]


def test_every_part_is_tested():
    assert list(TABLES) == [part.name for part in PARTS]
    assert parts.MINUTES < 9


@pytest.mark.parametrize("name", ["labels", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_part_writes_its_tables(name, tables_of):
    assert tables_of(name)


@pytest.mark.slow
def test_compiled_blocks(tmp_path, monkeypatch):
    # Traced as ever, but without the minute that a C++ compiler takes; tests of encoders have it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compilation.compiled.cache_clear()
    try:
        (table,) = check_record(run_part("compiled", tmp_path, small(CPU))).values()
    finally:
        compilation.compiled.cache_clear()
    assert [row["subject"].split(", ")[1] for row in table["values"]] == [
        "64x64",
        "70x50",
        "gradients of the last two blocks",
    ]


@pytest.mark.slow
def test_encoders_of_all_families_are_compared(tables_of):
    tables = tables_of("features")
    subjects = {row["subject"].split(",")[0] for row in tables["Encoders"]["values"]}
    assert subjects == {*(f"{name} (tiny)" for name in FAMILIES if name != "DINOv3.txt"), "vit_nano_patch8_dinov3"}
    half = [row for row in tables["Encoders"]["values"] if row["compared"].startswith("bfloat16")]
    assert half and all(0 < row["relative"] < 0.05 and row["cosine"] > 0.99 for row in half)


@pytest.mark.slow
def test_distillation_is_watched(tables_of):
    (table,) = tables_of("distillation").values()
    (row,) = table["values"]
    assert min(row["windows"], row["teacher"], row["student"], row["frozen"]) > 0
    assert row["frozen"] < row["step"] and row["teacher"] + row["student"] < 2 * row["step"]
    assert row["loading"]["batch"] == 1 and row["peak"] is row["waits"] is None


@pytest.mark.processes
@pytest.mark.slow
def test_a_failed_check_fails_the_tool(tmp_path, monkeypatch, capsys):
    settings = dataclasses.replace(small(CPU), models=(), sizes=((64, 64),))

    def run_here(self: Runner, part: Part, limit: float) -> Outcome:
        run_part(part.name, self.output, settings)
        return Outcome(part, "ran", 1.0)

    monkeypatch.setattr(Runner, "_run", run_here)
    options = ["--device", "cpu", "--small", "--parts"]
    run_tool(monkeypatch, tmp_path, *options, "labels")
    assert "FAILED" not in (tmp_path / "gpu_check.md").read_text()
    assert "FAILED" not in capsys.readouterr().out

    monkeypatch.setitem(checks.LIMITS, "bfloat16", 1e-9)
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, tmp_path, *options, "labels", "features")
    assert stopped.value.code == 1
    text = read_report(tmp_path)
    assert re.search(r"\| features \| \d+ rows, \*\*\d+ of its checks FAILED\*\* \|", text) and "| **FAILED** |" in text
    assert "| labels | passed, 19 rows |" in text
    assert "bfloat16 and float32 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["features"]
    assert found["machine"] and found["tables"]["Encoders"]["values"][0]["relative"] == 0


def read_report(folder) -> str:
    """The report, without the spaces that align its columns."""
    return re.sub(" +", " ", (folder / "gpu_check.md").read_text())


def run_tool(monkeypatch, folder, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(folder), *options])
    import_module("benchmarks.gpu_check.run").main()


@pytest.mark.slow
def test_a_part_over_its_limit_is_cut_and_the_others_run(tmp_path, capsys):
    short = Part("features", "cut", 1, "features.check_features", True)
    whole = Part("speed-encoders", "runs", 120, "speed.measure_encoders")
    (tmp_path / "speed-encoders.json").write_text("{left by an earlier check")
    outcomes = Runner(tmp_path, "cpu", is_small=True).run([short, whole])
    assert [outcome.state for outcome in outcomes] == ["cut", "ran"]
    assert outcomes[0].seconds < 15
    assert not report.write_report(tmp_path, outcomes)
    text = read_report(tmp_path)
    assert "| features | cut by its time limit after 0 rows, see features.log |" in text
    assert "| speed-encoders | 2 rows |" in text and "\n## Single passes\n" in text
    printed = capsys.readouterr().out
    assert "[1/2] features: cut; up to 1 s" in printed and "[2/2] speed-encoders: runs; up to 1" in printed
    assert "Single passes: |" in (tmp_path / "speed-encoders.log").read_text()


def test_a_failed_part_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    outcomes = Runner(tmp_path, "cpu", is_small=True).run(find(["speed-encoders"]))
    assert [outcome.state for outcome in outcomes] == ["failed"]
    assert not report.write_report(tmp_path, outcomes)
    assert "**FAILED** after 0 rows, see speed-encoders.log" in (tmp_path / "gpu_check.md").read_text()


def test_a_cut_part_without_checks_is_no_failure(tmp_path):
    for name, is_well in (("speed-encoders", True), ("labels", False)):
        assert report.write_report(tmp_path, [Outcome(*find([name]), "cut", 1.0)]) is is_well


def test_ctrl_c_ends_the_part_and_keeps_results(tmp_path):
    def interrupt() -> None:
        while not (tmp_path / "features.log").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    # Processes in the background of a shell begin with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        outcomes = Runner(tmp_path, "cpu", is_small=True).run(find(["features", "labels"]))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert [(outcome.part.name, outcome.state) for outcome in outcomes] == [("features", "stopped")]
    assert not report.write_report(tmp_path, outcomes)
    assert "| features | stopped by Ctrl-C after 0 rows" in read_report(tmp_path)


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, tmp_path / "new")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: tools/gpu_check.py needs a CUDA device, and PyTorch finds none")
    assert not (tmp_path / "new").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "labels", "speed"], "--parts must be out of features, targets, labels, .*; got speed"),
        (["--device", "cpu", "--minutes", "0"], "--minutes must be above 0, got 0"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, tmp_path, *options)
    assert re.match(f"error: {message}", capsys.readouterr().err)


class Event:
    """As those of torch.cuda, by the clock of the CPU."""

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.time - self.time)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the whole tool runs")
@pytest.mark.parametrize("name", ["labels", "panoptic", "distillation"])
def test_code_for_gpus_runs_on_a_pretended_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with PretendedCuda():
        record = run_part(name, tmp_path, dataclasses.replace(small(torch.device("cuda")), workers=0))
    found = json.loads(record.path.read_text())
    assert found["finished"] and not found["failed"]
    assert found["machine"]["device"] == "pretended" and found["machine"]["driver"]
    assert modes[:2] == ["warn", "default"]
    if name == "distillation":
        (row,) = found["tables"]["Distillation, 0 loading processes"]["values"]
        assert row["waits"] == row["peak"] == 0 and row["teacher"] > 0
    else:
        assert [row["passed"] for row in found["tables"]["Waits of the host"]["values"]] == [True, True]


def run_script(command: list[str], log: Path, cwd: Path) -> None:
    """Run a script without starting Python again, which takes seconds."""
    first = next(number for number, word in enumerate(command) if word.endswith(".py"))
    assert processes.run_tool(Path(command[first]), command[first + 1 :], log, folder=cwd) == 0, log.read_text()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_part_that_starts_processes(name, tables_of, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(demo, "run_child", run_script)
    tables = tables_of(name)
    if name == "torchrun":
        found = {row["question"]: row["found"] for row in tables[torchrun.TITLE]["values"]}
        assert found["a checkpoint is written"].startswith("model_00000")
        assert found["ends well, with a student"] == "exit code 0, model_final.pth"
    else:
        assert [row["method"] for row in tables["The demo"]["values"]][3] == "SPAR student, single pass"
