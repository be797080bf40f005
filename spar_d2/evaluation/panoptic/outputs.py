"""Converts "panoptic_seg" outputs of Detectron2's models to ids and categories of a data set. Needs no Detectron2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from spar_d2.evaluation.panoptic.quality import VOID, check_map, segment_ids


@dataclass(frozen=True)
class OutputForm:
    """Format of the predictions for a data set.

    Attributes:
        things, stuff: mappings from contiguous categories to the data set's; both may use the same contiguous numbers.
        label_divisor: divisor of labels category * label_divisor + instance, if that format is used.
    """

    things: Mapping[int, int]
    stuff: Mapping[int, int]
    label_divisor: int | None = None

    def read(
        self, ids: torch.Tensor | np.ndarray, segments: list[dict] | None, name: str
    ) -> tuple[np.ndarray, dict[int, int]]:
        """Convert a prediction to ids and their categories.

        Args:
            ids: (H, W) integers.
            segments: dicts of "id", "category_id" and "isthing". Categories are contiguous, or those of the data set if
                "isthing" is missing. Id 0 is void. None means that ``ids`` are labels, where -1 is void.
            name: name of the prediction in error messages.

        Returns:
            (H, W) integers, where 0 is void, and the data set's category of each id.

        Raises:
            ValueError: the format is invalid, or a category is unknown.
        """
        ids = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
        check_map(ids, name)
        return self._from_labels(ids, name) if segments is None else (ids, self._from_segments(segments, name))

    def _from_segments(self, segments: list[dict], name: str) -> dict[int, int]:
        categories: dict[int, int] = {}
        for segment in segments:
            if not {"id", "category_id"} <= set(segment):
                raise ValueError(f'{name}: a segment needs "id" and "category_id", got {sorted(segment)}')
            number, category, thing = int(segment["id"]), int(segment["category_id"]), segment.get("isthing")
            if number in categories:
                raise ValueError(f"{name}: the segment {number} is listed more than once")
            categories[number] = category if thing is None else self._dataset_category(category, bool(thing), name)
        return categories

    def _from_labels(self, labels: np.ndarray, name: str) -> tuple[np.ndarray, dict[int, int]]:
        if not self.label_divisor:
            raise ValueError(f'{name} has no list of segments, and the data set has no "label_divisor" in its metadata')
        # Label 0 is a segment. Adding one maps void to 0.
        ids = np.add(labels, 1, dtype=np.int64)
        present = segment_ids(ids).tolist()
        if present and present[0] < VOID:
            raise ValueError(f"{name}: labels must be -1 (void) or more, got {present[0] - 1}")
        categories = {number: (number - 1) // self.label_divisor for number in present if number != VOID}
        return ids, {
            number: self._dataset_category(category, category in self.things, name)
            for number, category in categories.items()
        }

    def _dataset_category(self, category: int, thing: bool, name: str) -> int:
        categories = self.things if thing else self.stuff
        if category not in categories:
            kind = "thing" if thing else "stuff"
            raise ValueError(f"{name}: the data set has no {kind} category {category}, it has {sorted(categories)}")
        return categories[category]
