"""Results of a part: tables in a JSON file, which is rewritten after every row."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.machine import describe
from benchmarks.tables import Table
from spar_d2.utils.io import write_text


class Record:
    """Tables of a part.

    Attributes:
        failed: descriptions of failed checks.

    Args:
        path: JSON file.
        part: name of the part.
        device: device of the part.
    """

    def __init__(self, path: Path, part: str, device: torch.device) -> None:
        self.path = path
        self.failed: list[str] = []
        self._started = time.monotonic()
        self._tables: dict[str, dict] = {}
        self._measurements: dict[str, list] = {}
        self._head = {"part": part, "date": str(datetime.date.today()), "machine": describe(device)}
        self._finished = False
        self._write()

    def add(self, title: str, table: Table, measurement: Any) -> None:
        """Add a row to a table. If the measurement has ``passed`` and it is False, the check is recorded as failed."""
        measured = self._measurements.setdefault(title, [])
        measured.append(measurement)
        self.add_row(title, table.head, table.row(measurement), dataclasses.asdict(measurement), table.notes(measured))
        if not getattr(measurement, "passed", True):
            self.failed.append(f"{title}: {table.row(measurement)}")
            self._write()

    def add_row(
        self, title: str, head: Sequence[str], row: str, values: Mapping[str, Any], notes: Sequence[str] = ()
    ) -> None:
        """Add a Markdown row and its values to a table. Notes apply to the whole table."""
        table = self._tables.setdefault(title, {"head": list(head), "rows": [], "values": []})
        table["rows"].append(row)
        table["values"].append(_plain(values))
        table["notes"] = list(notes)
        print(f"{title}: {row}", flush=True)
        self._write()

    def finish(self) -> None:
        """Mark the part as finished."""
        self._finished = True
        self._write()

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._started, 1)
        state = {"finished": self._finished, "seconds": seconds, "failed": self.failed}
        write_json(self.path, {**self._head, **state, "tables": self._tables})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", path)


def _plain(value: Any) -> Any:
    """Convert a value to JSON types; non-finite numbers become strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
