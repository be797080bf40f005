"""Matches the images that a model encoded in one forward pass with its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class EncodedImage:
    """An image that was encoded.

    Attributes:
        image: (3, H, W) input of the encoder.
        features: (D, h, w) output of the encoder.
        records: the matching input of the model, or all inputs if the match is ambiguous.
    """

    image: torch.Tensor
    features: torch.Tensor
    records: Sequence[Mapping] = field(default=())

    @property
    def name(self) -> str:
        """File names of the possible inputs."""
        return " or ".join(map(name_of, self.records)) or name_of({})

    @property
    def position(self) -> int | None:
        """Position of the sample in the run, if the data loader provides it."""
        return self.records[0].get("position") if len(self.records) == 1 else None


def name_of(record: Mapping) -> str:
    """Return the name of a model input for messages."""
    return str(record.get("file_name", record.get("image_id", "an unnamed image")))


def match(encoded: Sequence[tuple[torch.Tensor, torch.Tensor]], inputs: object) -> list[EncodedImage]:
    """Match encoded images with model inputs.

    If the model encodes all inputs in one batch, they are matched in order. If it encodes several batches, because
    image sizes differ, each encoded image is matched with the first remaining input of the same size.

    Args:
        encoded: images (B, 3, H, W) and features (B, D, h, w) of each call of the encoder.
        inputs: inputs of the model; in Detectron2, a list of dicts with "image" (3, H, W).
    """
    rows = [row for images, features in encoded for row in zip(images, features)]
    records = list(inputs) if isinstance(inputs, (list, tuple)) else []
    if not all(isinstance(record, Mapping) for record in records):
        records = []
    if len(rows) != len(records):
        return [EncodedImage(*row, records) for row in rows]
    if len(encoded) == 1:
        return [EncodedImage(*row, [record]) for row, record in zip(rows, records)]
    remaining = list(records)
    matched = []
    for row in rows:
        same = [i for i, record in enumerate(remaining) if getattr(record.get("image"), "shape", None) == row[0].shape]
        matched.append(EncodedImage(*row, [remaining.pop(same[0])] if same else records))
    return matched
