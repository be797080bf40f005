"""What Detectron2's models return as "panoptic_seg", as ids and their data set's categories. Needs no Detectron2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from spar_d2.evaluation.panoptic.quality import VOID, check_map, segment_ids


@dataclass(frozen=True)
class OutputForm:
    """How to read the predictions for a data set.

    Attributes:
        things, stuff: the data set's category for each contiguous one; both may use the same numbers.
        label_divisor: of labels category * label_divisor + instance, if there are such.
    """

    things: Mapping[int, int]
    stuff: Mapping[int, int]
    label_divisor: int | None = None

    def read(
        self, ids: torch.Tensor | np.ndarray, segments: list[dict] | None, name: str
    ) -> tuple[np.ndarray, dict[int, int]]:
        """The ids of a prediction and the category of each.

        Args:
            ids: (H, W) integers.
            segments: {"id", "category_id", "isthing"} each, where the category is contiguous, or the data set's own
                without "isthing"; id 0 is void. None: ``ids`` are labels, -1 is void.
            name: of the prediction, for errors.

        Returns:
            (H, W) integers with 0 for void, and the data set's category of each id.

        Raises:
            ValueError: not in one of these forms, or an unknown category.
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
            categories[number] = category if thing is None else self._own(category, bool(thing), name)
        return categories

    def _from_labels(self, labels: np.ndarray, name: str) -> tuple[np.ndarray, dict[int, int]]:
        if not self.label_divisor:
            raise ValueError(f'{name} has no list of segments, and the data set no "label_divisor" in its metadata')
        # Label 0 is a segment, too: all move up by one, and void to 0.
        ids = np.add(labels, 1, dtype=np.int64)
        found = segment_ids(ids).tolist()
        if found and found[0] < VOID:
            raise ValueError(f"{name}: labels must be -1 (void) or more, got {found[0] - 1}")
        categories = {number: (number - 1) // self.label_divisor for number in found if number != VOID}
        return ids, {
            number: self._own(category, category in self.things, name) for number, category in categories.items()
        }

    def _own(self, category: int, thing: bool, name: str) -> int:
        categories = self.things if thing else self.stuff
        if category not in categories:
            kind = "thing" if thing else "stuff"
            raise ValueError(f"{name}: the data set has no {kind} category {category}, it has {sorted(categories)}")
        return categories[category]
