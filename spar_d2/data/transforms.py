"""Augmentation for distillation: images of many sizes (SPAR, training details)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T


class ScaleAndCrop(T.Augmentation):
    """Scale into a box of random size, crop a random part with some chance, cut to whole patches.

    One augmentation does it all because an image that had to be enlarged is not cropped at random. Only if it is then
    longer than the box is it cut to the box's length, at a random place: this bounds memory.

    Args:
        box: (long side, short side) in pixels.
        factor: range (low, high) of the random factor on the box.
        min_short: shorter short sides are enlarged to this, in pixels.
        crop_prob: chance of a random part, 0..1.
        crop_fraction: a random part has at least this share of each side, 0..1;
        crop_side: at least this many pixels too, or the whole side where that is shorter.
        multiple: sides become a multiple of this, in pixels; smaller sides stay as they are.
    """

    # Set by Detectron2's `_init`.
    box: tuple[int, int]
    factor: tuple[float, float]
    min_short: int
    crop_prob: float
    crop_fraction: float
    crop_side: int
    multiple: int

    def __init__(
        self,
        box: tuple[int, int],
        factor: tuple[float, float],
        min_short: int,
        crop_prob: float,
        crop_fraction: float,
        crop_side: int,
        multiple: int,
    ) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.TransformList:
        size = image.shape[:2]
        scale, enlarged = self._scale(size, float(self._rand_range(*self.factor)))
        steps = []
        if enlarged:
            # Before scaling, as an image one pixel wide would grow to millions of pixels.
            longest = math.ceil(self.box[0] / scale)
            steps.append(_crop(size, [min(side, longest) for side in size]))
            size = steps[0].h, steps[0].w
        scaled = [round(scale * side) for side in size]
        if enlarged:
            kept = [min(side, self.box[0]) for side in scaled]
        elif self._rand_range() < self.crop_prob:
            kept = [self._part(side) for side in scaled]
        else:
            kept = scaled
        kept = [side - side % self.multiple if side >= self.multiple else side for side in kept]
        return T.TransformList([*steps, T.ResizeTransform(*size, *scaled), _crop(scaled, kept)])

    def _scale(self, size: tuple[int, int], factor: float) -> tuple[float, bool]:
        """Factor on the sides of an image, and whether the box had to give way to the least short side."""
        short, long = sorted(size)
        scale = factor * min(self.box[0] / long, self.box[1] / short)
        if round(scale * short) < self.min_short:
            return self.min_short / short, True
        return scale, False

    def _part(self, side: int) -> int:
        """A random length for a part of a side."""
        # Rounded, as 0.7 * 10 is a little more than 7.
        least = max(math.ceil(round(self.crop_fraction * side, 6)), self.crop_side)
        return np.random.randint(min(least, side), side + 1)


def _crop(size: Sequence[int], kept: Sequence[int]) -> T.CropTransform:
    """Crop an image of size (height, width) to another at a random place."""
    top, left = (np.random.randint(0, side - part + 1) for side, part in zip(size, kept))
    return T.CropTransform(left, top, kept[1], kept[0])


def build_augmentations(
    *,
    scale_box: Sequence[int],
    scale_range: Sequence[float],
    min_short_side: int,
    crop_prob: float,
    crop_min_fraction: float,
    crop_min_side: int,
    side_multiple: int,
    flip_prob: float,
) -> list[T.Augmentation]:
    """Scale, crop, flip, as ``SPAR.DATA`` says; arguments are its keys.

    Raises:
        ValueError: a number of the wrong kind or out of range; names the config key.
    """
    if not _is_pair(scale_box, numbers.Integral) or not 1 <= scale_box[1] <= scale_box[0]:
        raise ValueError(
            f"SPAR.DATA.SCALE_BOX must be whole pixels (long side, short side), long >= short >= 1, got {scale_box!r}"
        )
    if not _is_pair(scale_range, numbers.Real) or not 0 < scale_range[0] <= scale_range[1] < math.inf:
        raise ValueError(f"SPAR.DATA.SCALE_RANGE must be (low, high), 0 < low <= high, got {scale_range!r}")
    lengths = {"MIN_SHORT_SIDE": min_short_side, "CROP_MIN_SIDE": crop_min_side, "SIDE_MULTIPLE": side_multiple}
    for key, length in lengths.items():
        if not _is_number(length, numbers.Integral) or length < 1:
            raise ValueError(f"SPAR.DATA.{key} must be whole pixels, at least 1, got {length!r}")
    if min_short_side > scale_box[1]:
        raise ValueError(
            f"SPAR.DATA.MIN_SHORT_SIDE must be at most SCALE_BOX's short side {scale_box[1]}, got {min_short_side}"
        )
    shares = {"CROP_PROB": crop_prob, "CROP_MIN_FRACTION": crop_min_fraction, "FLIP_PROB": flip_prob}
    for key, share in shares.items():
        if not _is_number(share, numbers.Real) or not 0 <= share <= 1:
            raise ValueError(f"SPAR.DATA.{key} must be in 0..1, got {share!r}")
    box, factor = (scale_box[0], scale_box[1]), (scale_range[0], scale_range[1])
    return [
        ScaleAndCrop(box, factor, min_short_side, crop_prob, crop_min_fraction, crop_min_side, side_multiple),
        T.RandomFlip(flip_prob),
    ]


def _is_pair(value: object, kind: type) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(part, kind) for part in value)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
