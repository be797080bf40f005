"""Formats scores of inference modes on several data sets as in the paper's table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from spar_d2.data.datasets.catalog import BENCHMARKS
from spar_d2.utils.tables import format_table

_IN_MEAN = [name for name, benchmark in BENCHMARKS.items() if benchmark.in_mean]


@dataclass(frozen=True)
class Score:
    """A cell of the table.

    Attributes:
        method: name of the method, the row.
        dataset: name of the data set, the column.
        identity: cache key of the evaluation.
        images: number of images.
        scores: scores of the evaluator, in percent; nan if undefined.
        seconds_per_image: median run time of the model.
    """

    method: str
    dataset: str
    identity: str
    images: int
    scores: dict[str, float]
    seconds_per_image: float

    def plain(self) -> dict:
        """Convert to JSON types; nan becomes None."""
        scores = {name: None if math.isnan(value) else value for name, value in self.scores.items()}
        return {**asdict(self), "scores": scores}

    @classmethod
    def from_plain(cls, record: dict) -> Score:
        """Create from the result of :meth:`plain`."""
        scores = {name: math.nan if value is None else value for name, value in record["scores"].items()}
        return cls(**{**record, "scores": scores})


def summary(scores: Sequence[Score], missing: Sequence[str]) -> dict:
    """Collect all numbers of the table for a JSON file."""
    means = {method: _mean(row, _miou) for method, row in _rows(scores).items()}
    return {"scores": [score.plain() for score in scores], "mean mIoU": means, "not found": list(missing)}


def paper_table(scores: Sequence[Score], missing: Sequence[str] = ()) -> str:
    """Format the mIoU and run time of all methods on all data sets as Markdown tables.

    Args:
        scores: one score for each method and data set.
        missing: benchmarks that were not found. The mean is omitted if one of the paper's benchmarks is missing.
    """
    rows = _rows(scores)
    others = [score.dataset for score in scores if score.dataset not in _IN_MEAN]
    # A table of other data sets only, such as the user's own, needs no empty columns.
    paper = [*_IN_MEAN, "Mean"] if len(others) < len(scores) or not scores else []
    columns = [*paper, *dict.fromkeys(others)]
    titles = [BENCHMARKS[name].title if name in BENCHMARKS else name for name in columns]
    parts = []
    for quantity, value, digits in (("mIoU", _miou, 1), ("seconds per image", _seconds, 3)):
        lines = []
        for method, row in rows.items():
            cells = [_mean(row, value) if name == "Mean" else _cell(row, name, value) for name in columns]
            lines.append([method, *("-" if cell is None else f"{cell:.{digits}f}" for cell in cells)])
        parts.append(format_table([quantity, *titles], lines))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _notes(scores, missing))])


def _rows(scores: Sequence[Score]) -> dict[str, dict[str, Score]]:
    rows: dict[str, dict[str, Score]] = {}
    for score in scores:
        rows.setdefault(score.method, {})[score.dataset] = score
    return rows


def _miou(score: Score) -> float:
    return score.scores["mIoU"]


def _seconds(score: Score) -> float:
    return score.seconds_per_image


def _cell(row: dict[str, Score], dataset: str, value: Callable[[Score], float]) -> float | None:
    return value(row[dataset]) if dataset in row else None


def _mean(row: dict[str, Score], value: Callable[[Score], float]) -> float | None:
    cells = [value(row[name]) for name in _IN_MEAN if name in row]
    return statistics.mean(cells) if len(cells) == len(_IN_MEAN) else None


def _notes(scores: Sequence[Score], missing: Sequence[str]) -> list[str]:
    notes = ["mIoU in percent, over the classes in the ground truth. Run times: median, model only."]
    for name, count in {score.dataset: score.images for score in scores}.items():
        if name in BENCHMARKS and count < BENCHMARKS[name].images:
            notes.append(f"{BENCHMARKS[name].title}: {count} of {BENCHMARKS[name].images} images.")
    if missing:
        notes.append(f"Not found on disk: {', '.join(missing)}.")
    return notes
