"""Augmentation for distillation: images of many sizes (SPAR, training details)."""

from __future__ import annotations

import numpy as np
from detectron2.data import transforms as T


class ScaleShortSide(T.ResizeShortestEdge):
    """Detectron2's resize, for images of any proportions: no side is scaled to nothing."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        height, width = image.shape[:2]
        return T.ResizeTransform(height, width, max(resize.new_h, 1), max(resize.new_w, 1))


class CropToMultiple(T.Augmentation):
    """Crop to whole patches: with some chance a random part, otherwise as much as there is.

    Args:
        multiple: sides become a multiple of this, in pixels; smaller sides stay as they are.
        prob: chance of a random part, 0..1.
        min_fraction: a random part has at least this share of each side, 0..1;
        min_side: at least this many pixels too, or the whole side where that is shorter.
    """

    def __init__(self, multiple: int, prob: float, min_fraction: float, min_side: int) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        partly = self._rand_range() < self.prob
        (top, height), (left, width) = (self._interval(length, partly) for length in image.shape[:2])
        return T.CropTransform(left, top, width, height)

    def _interval(self, length: int, partly: bool) -> tuple[int, int]:
        """Start and length of the part kept of a side."""
        kept = length
        if partly:
            least = min(max(int(self.min_fraction * length), self.min_side), length)
            kept = np.random.randint(least, length + 1)
        if kept >= self.multiple:
            kept -= kept % self.multiple
        return np.random.randint(0, length - kept + 1) if partly else 0, kept


def build_augmentations(
    side_multiple: int,
    short_side: tuple[int, int],
    max_side: int,
    crop_prob: float,
    crop_min_fraction: float,
    crop_min_side: int,
    flip_prob: float,
) -> list[T.Augmentation]:
    """Scale, crop, flip, as ``SPAR.DATA`` says; arguments are its keys.

    Raises:
        ValueError: a number out of range; names the config key.
    """
    whole = len(short_side) == 2 and all(isinstance(side, int) for side in short_side)
    if not whole or not 1 <= short_side[0] <= short_side[1]:
        raise ValueError(f"SPAR.DATA.SHORT_SIDE must be whole pixels (low, high), 1 <= low <= high; got {short_side}")
    if max_side < short_side[0]:
        raise ValueError(f"SPAR.DATA.MAX_SIDE must be at least SHORT_SIDE's low {short_side[0]}, got {max_side}")
    for key, value in {"CROP_MIN_SIDE": crop_min_side, "SIDE_MULTIPLE": side_multiple}.items():
        if value < 1:
            raise ValueError(f"SPAR.DATA.{key} must be at least 1, got {value}")
    shares = {"CROP_PROB": crop_prob, "CROP_MIN_FRACTION": crop_min_fraction, "FLIP_PROB": flip_prob}
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"SPAR.DATA.{key} must be in 0..1, got {share}")
    return [
        ScaleShortSide(tuple(short_side), max_side, sample_style="range"),
        CropToMultiple(side_multiple, crop_prob, crop_min_fraction, crop_min_side),
        T.RandomFlip(flip_prob),
    ]
