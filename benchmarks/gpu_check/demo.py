"""Runs the demo on the GPU and compares its scores with those of a CPU."""

from __future__ import annotations

import sys

from benchmarks.gpu_check.checks import FACTS, Fact
from benchmarks.gpu_check.children import run_child
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import ROOT, Settings

_TOLERANCE = 1.0


def run_demo(record: Record, settings: Settings) -> None:
    """Run ``tools/run_demo.py`` on the device, and compare the mIoU of its table with the README's."""
    output = record.path.parent / "demo"
    (output / "table.md").unlink(missing_ok=True)
    tool = [sys.executable, "-W", "ignore::FutureWarning", str(ROOT / "tools" / "run_demo.py")]
    overrides = ["MODEL.DEVICE", settings.device.type, *settings.demo_overrides]
    # Paths in the config are relative to the root of the repository.
    command = [*tool, "--output", str(output.resolve()), *map(str, overrides)]
    run_child(command, record.path.parent / "demo.run.log", cwd=ROOT)
    head, dashes, *rows = (output / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    names = [cell.strip() for cell in head.split("|")[1:-1]]
    for row, values in zip(rows, cells):
        record.add_row("The demo", (head, dashes), row, dict(zip(names, values)))
    for number, expected in settings.demo_scores:
        method, found = cells[number][0], float(cells[number][1])
        question = f"mIoU of a CPU, {expected}, within {_TOLERANCE:.0f}"
        record.add("Scores of the demo", FACTS, Fact(method, question, f"{found}", abs(found - expected) <= _TOLERANCE))
