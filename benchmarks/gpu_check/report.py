"""Report of all parts in Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.record import write_json
from benchmarks.gpu_check.runner import Outcome
from benchmarks.tables import write_lines
from spar_d2.utils.tables import format_table

MARKDOWN, JSON = "gpu_check.md", "gpu_check.json"


def write_report(output: Path, outcomes: Sequence[Outcome]) -> bool:
    """Write the results of all parts to ``gpu_check.md`` and ``gpu_check.json`` in a folder.

    Returns:
        True if no part and no check failed, and all parts with checks ran to their end.
    """
    records = [_read(output / f"{outcome.part.name}.json") for outcome in outcomes]
    results = [_result(outcome, record) for outcome, record in zip(outcomes, records)]
    first = next((record for record in records if record), {})
    machine = first.get("machine", {})
    lines = ["# GPU check", "", f"{', '.join(_describe(machine))}; {first.get('date', 'no part began')}.", ""]
    rows = [(o.part.name, result, f"{o.seconds:.0f}", o.part.about) for o, result in zip(outcomes, results)]
    lines.append(format_table(["part", "result", "s", "about"], rows, left=4))
    for record in records:
        for title, table in record.get("tables", {}).items():
            lines += ["", f"## {title}", "", *table["head"], *table["rows"]]
            lines += ["", *table["notes"]] if table["notes"] else []
    write_lines(output / MARKDOWN, lines)
    parts = {
        outcome.part.name: {"result": result, "state": outcome.state, "seconds": round(outcome.seconds, 1), **record}
        for outcome, result, record in zip(outcomes, results, records)
    }
    write_json(output / JSON, {"machine": machine, "date": first.get("date"), "parts": parts})
    return all(_is_ok(outcome, record) for outcome, record in zip(outcomes, records))


def summary(output: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """Return one line per part, and one per failed check."""
    lines = []
    for outcome in outcomes:
        record = _read(output / f"{outcome.part.name}.json")
        lines.append(f"{outcome.part.name}: {_result(outcome, record)}")
        lines += [f"    {failed}" for failed in record.get("failed", ())]
    return lines


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _result(outcome: Outcome, record: dict) -> str:
    rows = sum(len(table["rows"]) for table in record.get("tables", {}).values())
    failed = len(record.get("failed", ()))
    checks = f", **{failed} of its checks FAILED**" if failed else ""
    if outcome.state == "ran":
        return f"{rows} rows{checks}" if failed or not outcome.part.is_check else f"passed, {rows} rows"
    descriptions = {"failed": "**FAILED**", "cut": "cut by its time limit", "stopped": "stopped by Ctrl-C"}
    return f"{descriptions[outcome.state]} after {rows} rows{checks}, see {outcome.part.name}.log"


def _is_ok(outcome: Outcome, record: dict) -> bool:
    if record.get("failed") or outcome.state == "failed":
        return False
    return outcome.state == "ran" or not outcome.part.is_check


def _describe(machine: dict[str, str]) -> list[str]:
    return [text if name == "device" else f"{name} {text}" for name, text in machine.items()] or ["an unknown machine"]
