"""Counts and scores of panoptic segmentation. Needs only NumPy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from spar_d2.utils.tables import format_table

_GROUPS = ("All", "Things", "Stuff")


@dataclass(frozen=True, eq=False)
class PanopticCounts:
    """Counts by category. Counts of several images are added with ``+``.

    Attributes:
        categories: ids of the C categories.
        values: (C, 4) float64: sum of the IoUs of matches, and numbers of true positives (matches), false positives and
            false negatives.
    """

    categories: tuple[int, ...]
    values: np.ndarray

    @classmethod
    def zeros(cls, categories: Iterable[int]) -> PanopticCounts:
        """Create zero counts."""
        categories = tuple(categories)
        return cls(categories, np.zeros((len(categories), 4)))

    def __add__(self, other: PanopticCounts) -> PanopticCounts:
        if self.categories != other.categories:
            raise ValueError(
                f"counts must be of the same categories, got {len(self.categories)} and {len(other.categories)}"
            )
        return PanopticCounts(self.categories, self.values + other.values)

    def scores(self, things: Collection[int]) -> dict[str, dict]:
        """Compute scores in 0..1.

        Args:
            things: categories that are things; the others are stuff.

        Returns:
            "All", "Things" and "Stuff", each {"pq", "sq", "rq", "n"}: means over the ``n`` categories with a true
            positive, false positive or false negative, or 0 if there are none; and "per_class": {category: {"pq", "sq",
            "rq"}} of every category, 0 for those without counts.
        """
        iou, matched, false_positives, false_negatives = self.values.T
        total = matched + false_positives / 2 + false_negatives / 2
        each = np.zeros((3, len(total)))
        for score, (top, bottom) in zip(each, ((iou, total), (iou, matched), (matched, total))):
            np.divide(top, bottom, out=score, where=bottom > 0)
        thing = np.array([category in things for category in self.categories], dtype=bool)
        scores: dict[str, dict] = {}
        for name, members in zip(_GROUPS, (np.ones_like(thing), thing, ~thing)):
            occurring = members & (total > 0)
            means = each[:, occurring].mean(axis=1) if occurring.any() else np.zeros(3)
            scores[name] = {**_named(means), "n": int(occurring.sum())}
        scores["per_class"] = {category: _named(values) for category, values in zip(self.categories, each.T)}
        return scores


def score_table(scores: Mapping[str, Mapping], names: Mapping[int, str] | None = None) -> str:
    """Format :meth:`PanopticCounts.scores` in percent, as a table; with ``names``, one row per category is added."""
    groups = [(name, scores[name]) for name in _GROUPS]
    groups += [(name, scores["per_class"][category]) for category, name in (names or {}).items()]
    rows = [
        [name, *(f"{100 * values[key]:.2f}" for key in ("pq", "sq", "rq")), str(values.get("n", ""))]
        for name, values in groups
    ]
    return format_table(["", "PQ", "SQ", "RQ", "categories"], rows, style="plain")


def _named(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("pq", "sq", "rq"), values.tolist()))
