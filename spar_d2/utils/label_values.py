"""Reads the label maps of dataset dicts, whose pixel values may differ from the labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from spar_d2.utils.images import read_labels

# Key of dataset dicts: pairs of pixel value and label, sorted by value. Without it, pixel values are labels.
VALUES = "label_values"
_UNKNOWN = -1


def read_label_map(record: Mapping) -> np.ndarray:
    """Read the label map of a dataset dict with "sem_seg_file_name".

    Returns:
        Labels (H, W), uint8 or uint16.

    Raises:
        FileNotFoundError, ValueError: as :func:`spar_d2.utils.images.read_labels`, or a pixel value is neither a class
            nor ignored.
    """
    labels = read_labels(record["sem_seg_file_name"])
    return labels if VALUES not in record else renumber(labels, record[VALUES], record["sem_seg_file_name"])


def renumber(values: np.ndarray, pairs: tuple[tuple[int, int], ...], file: str) -> np.ndarray:
    """Convert pixel values (H, W) to labels by pairs of value and label; ``file`` is for the error message."""
    table = _table(pairs)
    labels = table[values]
    if labels.min(initial=0) == _UNKNOWN:
        unknown = np.unique(values[labels == _UNKNOWN]).tolist()
        shown = f"{', '.join(map(str, unknown[:8]))}{', ...' if len(unknown) > 8 else ''}"
        raise ValueError(
            f"label map: {file} has the pixel values {shown}, which are neither a class nor ignored; correct classes "
            "or ignore of the data-set file"
        )
    return labels.astype(np.uint8 if int(table.max()) < 256 else np.uint16)


@functools.lru_cache(maxsize=8)
def _table(pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    table = np.full(2**16, _UNKNOWN, dtype=np.int32)
    for value, label in pairs:
        table[value] = label
    return table
