"""Markdown tables of measurements, shown row by row as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spar_d2.utils.io import atomic_write

PEAK_NOTE = (
    "peak: beside weights and image; of tensors on a GPU, of the process, with some tens of MiB of buffers, on a CPU."
)
NO_PEAK = '"-" under peak: the system does not tell.'
NO_LIBRARY = "nothing to compare with, or no room for it in memory."


@dataclass(frozen=True)
class Table:
    """What a table shows of a measurement.

    Attributes:
        columns: text of a cell, by the column's name; the first two columns are words, the others numbers.
        always: notes that every reader must know.
        sometimes: notes that only some measurements call for, and which.
    """

    columns: Mapping[str, Callable[[Any], str]]
    always: Sequence[str]
    sometimes: Mapping[str, Callable[[Any], bool]]

    @property
    def head(self) -> tuple[str, str]:
        """The two lines above the rows."""
        return f"| {' | '.join(self.columns)} |", f"|{'---|' * 2}{'---:|' * (len(self.columns) - 2)}"

    def row(self, measurement: Any) -> str:
        """A row under :attr:`head`."""
        return f"| {' | '.join(cell(measurement) for cell in self.columns.values())} |"

    def notes(self, measurements: Sequence[Any]) -> list[str]:
        """What the reader of a table with these rows must know, as a list in markdown."""
        called_for = [note for note, concerns in self.sometimes.items() if any(map(concerns, measurements))]
        return [f"- {note}" for note in (*self.always, *called_for)]

    def show(self, title: str, measurements: Mapping[str, Iterable[Any]], total: int, output: Path | None) -> None:
        """Print the table row by row, and keep in the file what there is of it.

        Args:
            title: line above the table.
            measurements: made while they are gone through, by the name of what is measured.
            total: how many they will be.
            output: a file for the table, beside stdout.
        """
        lines, done = [title, "", *self.head], []
        print("\n".join(lines), flush=True)
        with tqdm(total=total, unit="case", leave=False) as progress:
            for name, several in measurements.items():
                progress.set_description(name)
                for measurement in several:
                    done.append(measurement)
                    lines.append(self.row(measurement))
                    with tqdm.external_write_mode():
                        print(lines[-1], flush=True)
                    if output:
                        write_lines(output, [*lines, "", *self.notes(done)])
                    progress.update()
        print("", *self.notes(done), sep="\n")


def number(value: float | None, unit: float = 1) -> str:
    """In a unit, with three digits; "-" for what could not be had."""
    if value is None:
        return "-"
    scaled = value / unit
    return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"


def ratio(value: float | None, other: float | None) -> str:
    """One value by another; "-" where one could not be had, or nothing is to be divided by."""
    return "-" if value is None or not other else f"{value / other:.3f}"


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file that either is complete or is not there."""
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
