"""Markdown tables of measurements, printed row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spar_d2.utils.io import write_text

PEAK_NOTE = (
    "peak: without weights and image; memory of tensors on a GPU, of the process on a CPU (tens of MiB of workspaces)."
)
NO_PEAK = '"-" under peak: not available on this system.'
NO_LIBRARY = "there is no reference, or not enough memory for it."


@dataclass(frozen=True)
class Table:
    """Columns and notes of a table.

    Attributes:
        columns: functions from a measurement to the text of a cell, by column name.
        always: notes below every table.
        sometimes: notes, with conditions on the measurements for which they are shown.
        left: number of columns of text; the others are numbers.
    """

    columns: Mapping[str, Callable[[Any], str]]
    always: Sequence[str] = ()
    sometimes: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    left: int = 2

    @property
    def head(self) -> tuple[str, str]:
        """Header lines of the table."""
        # Rows are printed one by one, so that columns cannot be aligned as by spar_d2.utils.tables.
        numbers = len(self.columns) - self.left
        return f"| {' | '.join(self.columns)} |", f"|{'---|' * self.left}{'---:|' * numbers}"

    def row(self, measurement: Any) -> str:
        """Format a row."""
        return f"| {' | '.join(cell(measurement) for cell in self.columns.values())} |"

    def notes(self, measurements: Sequence[Any]) -> list[str]:
        """Return the notes for a table of measurements, as a Markdown list."""
        applicable = [note for note, concerns in self.sometimes.items() if any(map(concerns, measurements))]
        return [f"- {note}" for note in (*self.always, *applicable)]

    def _below(self, measurements: Sequence[Any]) -> list[str]:
        notes = self.notes(measurements)
        return ["", *notes] if notes else []

    def show(self, title: str, measurements: Mapping[str, Iterable[Any]], total: int, output: Path | None) -> None:
        """Print the table row by row, and write it to a file after every row.

        Args:
            title: line above the table.
            measurements: lazily computed measurements, by name.
            total: number of measurements.
            output: optional output file.
        """
        lines, done = [title, "", *self.head], []
        print("\n".join(lines), flush=True)
        with tqdm(total=total, unit="case", leave=False) as progress:
            for name, group in measurements.items():
                progress.set_description(name)
                for measurement in group:
                    done.append(measurement)
                    lines.append(self.row(measurement))
                    with tqdm.external_write_mode():
                        print(lines[-1], flush=True)
                    if output:
                        write_lines(output, [*lines, *self._below(done)])
                    progress.update()
        print("".join(f"{line}\n" for line in self._below(done)), end="", flush=True)


def number(value: float | None, unit: float = 1) -> str:
    """Format a value in a unit with three digits, or "-" for None."""
    if value is None:
        return "-"
    scaled = value / unit
    return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"


def ratio(value: float | None, other: float | None) -> str:
    """Format the ratio of two values, or "-" if it is undefined."""
    return "-" if value is None or not other else f"{value / other:.3f}"


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file atomically."""
    write_text("\n".join(lines) + "\n", path)
