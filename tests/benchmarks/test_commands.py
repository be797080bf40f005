"""The command line of the benchmarks."""

import ast
import sys
from importlib import import_module

import pytest
import torch

from reference import ROOT

TINY = "vit_nano_patch8_dinov3"


@pytest.fixture
def benchmark(monkeypatch):
    tool = import_module("benchmarks.__main__")

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
        tool.main()

    return run


@pytest.mark.slow
def test_table_is_printed_and_written(benchmark, tmp_path, capsys):
    output = tmp_path / "new" / "table.md"
    options = ["--encoders", TINY, "--sizes", "64", "40", "--precisions", "bfloat16", "--repeats", "1"]
    benchmark("encoders", *options, "--device", "cpu", "--output", str(output))
    text = output.read_text()
    assert text == capsys.readouterr().out
    title, _, head, _, *rows = text.splitlines()
    assert torch.__version__ in title
    assert head.startswith("| encoder | precision | size | tokens | GFLOP | ms | library ms | ratio | TFLOP/s |")
    found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[:2]]
    assert [row[:4] for row in found] == [[TINY, "bfloat16", "64", "64"], [TINY, "bfloat16", "40", "25"]]
    assert all(float(cell) > 0 for row in found for cell in row[4:8])
    assert rows[2] == "" and all(row.startswith("- ") for row in rows[3:])
    assert [path.name for path in output.parent.iterdir()] == ["table.md"]


@pytest.mark.slow
def test_teacher_table_is_printed_and_written(benchmark, tmp_path, capsys):
    output = tmp_path / "table.md"
    options = ["--encoders", TINY, "--sizes", "100x90", "40x70", "--precisions", "bfloat16", "--repeats", "1"]
    options += ["--windows", "4", "--stride", "20", "--device", "cpu", "--output", str(output)]
    benchmark("teacher", *options)
    text = output.read_text()
    assert text == capsys.readouterr().out
    title, _, head, _, *rows = text.splitlines()
    assert torch.__version__ in title and title.endswith("; stride 20, batches of 8 (straightforward: 8)")
    assert head.startswith("| encoder | precision | size | windows | windows/s | straightforward windows/s | ratio |")
    found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[:2]]
    assert [row[:4] for row in found] == [[TINY, "bfloat16", "100x90", "4 of 9"], [TINY, "bfloat16", "40x70", "2"]]
    assert all(float(cell) > 0 for row in found for cell in row[4:9])
    assert rows[2] == "" and all(row.startswith("- ") for row in rows[3:])

    benchmark("teacher", *options, "--student")
    head, _, *rows = output.read_text().splitlines()[2:6]
    assert head.endswith("| difference / std | student ms | teacher / student |")
    for cells in (row.split("|")[1:-1] for row in rows):
        seconds, milliseconds, ratio = (float(cells[place]) for place in (8, -2, -1))
        assert ratio == pytest.approx(1e3 * seconds / milliseconds, rel=0.02) and ratio > 0


@pytest.mark.processes
@pytest.mark.slow
def test_the_load_of_the_service_is_measured(benchmark, tmp_path, capsys):
    output = tmp_path / "table.md"
    options = ["--clients", "1", "3", "--requests", "6", "--long-side", "48", "--device", "cpu"]
    benchmark("service", *options, "--output", str(output))
    text = output.read_text()
    assert text == capsys.readouterr().out
    title, _, head, _, *rows = text.splitlines()
    assert torch.__version__ in title and head.startswith("| clients | requests | errors | requests/s | median ms |")
    found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[:2]]
    assert [row[:3] for row in found] == [["1", "6", "0"], ["3", "6", "0"]]
    assert all(float(cell) > 0 for row in found for cell in row[3:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoders", "ViT-B-61"], "--encoders: unknown encoder 'ViT-B-61'; did you mean ViT-B-16"),
        (["--sizes", "512"], "--sizes must be a width and a height in pixels, such as 2048x1024; got 512"),
        (
            ["--sizes", "512x512", "512x0"],
            "--sizes must be a width and a height in pixels, such as 2048x1024; got 512x0",
        ),
        (["--stride", "225"], "--stride must be in 1..224"),
        (["--stride", "0"], "--stride must be in 1..224"),
        (["--batch-size", "0"], "--batch-size"),
        (["--baseline-batch-size", "0"], "--baseline-batch-size"),
        (["--windows", "0"], "--windows"),
    ],
)
def test_wrong_options_of_teacher_are_one_line(benchmark, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        benchmark("teacher", *options)
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert printed.err.startswith(f"error: {message}") and "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoders", "ViT-B-61"], "--encoders: unknown encoder 'ViT-B-61'; did you mean ViT-B-16"),
        (["--encoders", "none.json"], "--encoders: there is no model config file none.json"),
        (["--sizes", "512", "0"], "--sizes"),
        (["--repeats", "0"], "--repeats"),
        (["--output", "."], "--output must be a file, . is a folder"),
        (["--dinov3-repo", "nowhere"], "--dinov3-repo: dinov3_vitl16_dinotxt_tet1280d20h24l needs a clone"),
        (["--encoders", "dinov3_vitl16_dinotxt_tet1280d20h24l"], "--dinov3-repo: "),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: PyTorch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_options_are_one_line(benchmark, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        benchmark("encoders", *options)
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert printed.err.startswith(f"error: {message}") and "Traceback" not in printed.err
    assert printed.out == ""


def test_traceback_on_request(benchmark, monkeypatch):
    monkeypatch.setenv("SPAR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--sizes"):
        benchmark("encoders", "--sizes", "0")


def test_starting_imports_no_detectron2():
    """Parts import their own requirements."""
    top = ast.parse((ROOT / "benchmarks" / "__main__.py").read_text()).body
    modules = {node.module for node in top if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert "detectron2" not in {module.split(".")[0] for module in modules}
    used = {module.split(".")[1] for module in modules if module.startswith("spar_d2.")}
    assert used <= {"encoders", "utils"}


@pytest.mark.slow
def test_loading_beside_training(benchmark, tiny_cfg, photo_folder, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(tiny_cfg.dump())
    options = ["--config-file", str(tmp_path / "config.yaml"), "--images", str(photo_folder), "--steps", "4"]
    benchmark("loading", *options, "--workers", "0", "1", "--output", str(tmp_path / "table.md"))
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip(" %") for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert [row[0] for row in rows] == ["0", "1"]
    for _, _, alone, training, waiting in rows:
        assert float(alone) > 0
        assert float(training) > 0
        assert 0 <= float(waiting) < 100


@pytest.mark.slow
def test_evaluators_beside_each_other(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        benchmark("evaluator", "--images", "2", "--output", str(tmp_path / "table.md"))
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip(" x") for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert [row[:2] for row in rows] == [["640x480", "150"], ["2048x1024", "19"]]
    assert all(float(cell) > 0 for row in rows for cell in row[2:6])
    assert all(float(row[6]) < 1e-11 for row in rows)


@pytest.mark.slow
def test_panoptic_evaluation_beside_png_files(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        benchmark("panoptic", "--images", "2", "--output", str(tmp_path / "table.md"))
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip(" x") for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert [row[:2] for row in rows] == [["640x480", "8"], ["640x480", "20"], ["640x480", "60"]]
    assert all(float(cell) > 0 for row in rows for cell in row[2:5])
    assert all(float(row[5]) < 1e-11 for row in rows)


def test_last_step_beside_full_maps(benchmark, tmp_path, capsys):
    options = ["--encoder", TINY, "--long-side", "100", "--words", "3", "7", "--repeats", "1", "--device", "cpu"]
    benchmark("postprocess", *options, "--output", str(tmp_path / "table.md"))
    text = (tmp_path / "table.md").read_text()
    assert text == capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:8]]
    assert [row[:3] for row in rows] == [
        [str(words), threshold, "100x100"] for words in (3, 7) for threshold in ("none", "probability")
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[3:5])
    assert all(float(row[9]) < 1e-3 for row in rows)


def test_full_maps_without_room_are_left_out(benchmark, capsys):
    options = ["--encoder", TINY, "--long-side", "64", "--words", "3", "--repeats", "1", "--device", "cpu"]
    benchmark("postprocess", *options, "--room", "0")
    printed = capsys.readouterr().out
    assert "| - | - |" in printed and "not enough memory" in printed


def test_refinement_is_compared_with_all_of_an_image_at_once(benchmark, capsys, tmp_path):
    benchmark(
        "refinement", "--long-side", "96", "--words", "3", "--device", "cpu", "--output", str(tmp_path / "table.md")
    )
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if "`" in line]
    assert [row[0] for row in rows] == ["`lposs`", "`lposs+`", "`anyup`"]
    for row in rows:
        assert row[2] == "3" and float(row[3]) > 0 and float(row[4]) > 0
        assert float(row[-1]) <= 1e-3, "the same labels"
    benchmark("refinement", "--long-side", "64", "--words", "3", "--steps", "lposs", "--room", "0", "--device", "cpu")
    assert "not enough memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--words", "0"], "--words"),
        (["--long-side", "0"], "--long-side"),
        (["--image", "nowhere.jpg"], "image: nowhere.jpg does not exist"),
        (["--encoder", "ViT-B-61"], "--encoder: unknown encoder 'ViT-B-61'"),
    ],
)
def test_wrong_options_of_postprocess_are_one_line(benchmark, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark("postprocess", *options)
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_wrong_numbers_for_loading_are_named(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("loading", "--steps", "1")
    assert "--steps must be at least 2" in capsys.readouterr().err
