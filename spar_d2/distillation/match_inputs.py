"""What a model encoded in one forward pass, image by image, and which of its inputs each image was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class EncodedImage:
    """One image that went through the encoder.

    Attributes:
        image: (3, H, W) as the encoder took it.
        features: (D, h, w) that it gave.
        records: the model's inputs that it may be: one, or all where that cannot be told.
    """

    image: torch.Tensor
    features: torch.Tensor
    records: Sequence[Mapping] = field(default=())

    @property
    def name(self) -> str:
        """Files of the inputs that it may be."""
        return " or ".join(map(name_of, self.records)) or name_of({})

    @property
    def position(self) -> int | None:
        """Number of the draw in the run, where the loader tells."""
        return self.records[0].get("position") if len(self.records) == 1 else None


def name_of(record: Mapping) -> str:
    """What to call an input of a model in a message."""
    return str(record.get("file_name", record.get("image_id", "an image without name")))


def match(encoded: Sequence[tuple[torch.Tensor, torch.Tensor]], inputs: object) -> list[EncodedImage]:
    """Tell which input each encoded image was.

    A model that encodes all its inputs in one batch does so in their order. One that encodes them in several, as sizes
    differ, is matched by size: each image is the first input of its size that is left.

    Args:
        encoded: (B, 3, H, W) and (B, D, h, w) of each time that the encoder ran.
        inputs: of the model; in Detectron2 a list of dicts with "image" (3, H, W).
    """
    rows = [row for images, features in encoded for row in zip(images, features)]
    records = list(inputs) if isinstance(inputs, (list, tuple)) else []
    if not all(isinstance(record, Mapping) for record in records):
        records = []
    if len(rows) != len(records):
        return [EncodedImage(*row, records) for row in rows]
    if len(encoded) == 1:
        return [EncodedImage(*row, [record]) for row, record in zip(rows, records)]
    left = list(records)
    matched = []
    for row in rows:
        same = [i for i, record in enumerate(left) if getattr(record.get("image"), "shape", None) == row[0].shape]
        matched.append(EncodedImage(*row, [left.pop(same[0])] if same else records))
    return matched
