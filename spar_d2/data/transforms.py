"""Multi-scale augmentation for distillation (SPAR, training details), and resizing of test images."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T


def resize_shortest_edge(image: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """Resize an image (H, W, C) as Detectron2's tests do; a ``shortest`` of 0 returns it unchanged.

    Args:
        image: image of any size.
        shortest, longest: shortest side and maximum longest side of the result in pixels.
    """
    if not shortest:
        return image
    height, width = image.shape[:2]
    size = T.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
    # The short side of a very long image may be rounded to 0.
    return T.ResizeTransform(height, width, *(max(side, 1) for side in size)).apply_image(image)


class ScaleAndCrop(T.Augmentation):
    """Scales an image to a box of random size, crops it randomly, and trims its sides to whole patches.

    These steps form a single augmentation because images that are enlarged to the minimum short side are not cropped
    randomly. Their long side is cropped at a random position only if it exceeds that of the box, to bound memory.

    Args:
        box: (long side, short side) in pixels.
        factor: range (low, high) of the random scale factor of the box.
        min_short: minimum short side in pixels; smaller images are enlarged.
        crop_prob: probability of a random crop, 0..1.
        crop_fraction: minimum fraction of each side that a random crop keeps, 0..1.
        crop_side: minimum side of a random crop in pixels; shorter sides are not cropped.
        multiple: sides are trimmed to multiples of this number of pixels; shorter sides are not trimmed.
    """

    # Set by `_init` of Detectron2.
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
            # Crop before scaling: a one pixel wide image would grow to millions of pixels.
            longest = math.ceil(self.box[0] / scale)
            steps.append(_crop(size, [min(side, longest) for side in size]))
            size = steps[0].h, steps[0].w
        scaled = [round(scale * side) for side in size]
        if enlarged:
            crop_size = [min(side, self.box[0]) for side in scaled]
        elif self._rand_range() < self.crop_prob:
            crop_size = [self._crop_length(side) for side in scaled]
        else:
            crop_size = scaled
        crop_size = [side - side % self.multiple if side >= self.multiple else side for side in crop_size]
        return T.TransformList([*steps, T.ResizeTransform(*size, *scaled), _crop(scaled, crop_size)])

    def _scale(self, size: tuple[int, int], factor: float) -> tuple[float, bool]:
        """Return the scale factor of an image, and whether it is enlarged beyond the box to the minimum short side."""
        short, long = sorted(size)
        scale = factor * min(self.box[0] / long, self.box[1] / short)
        if round(scale * short) < self.min_short:
            return self.min_short / short, True
        return scale, False

    def _crop_length(self, side: int) -> int:
        """Draw a random length of a crop along one side."""
        # Rounded, because 0.7 * 10 is slightly more than 7.
        minimum = max(math.ceil(round(self.crop_fraction * side, 6)), self.crop_side)
        return np.random.randint(min(minimum, side), side + 1)


def _crop(size: Sequence[int], crop_size: Sequence[int]) -> T.CropTransform:
    """Create a crop at a random position, from (height, width) ``size`` to ``crop_size``."""
    top, left = (np.random.randint(0, side - part + 1) for side, part in zip(size, crop_size))
    return T.CropTransform(left, top, crop_size[1], crop_size[0])


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
    """Build the scale, crop and flip augmentations. The arguments are the keys of ``SPAR.DATA``.

    Raises:
        ValueError: a value has the wrong type or is out of range; the message names the config key.
    """
    if not _is_pair(scale_box, numbers.Integral) or not 1 <= scale_box[1] <= scale_box[0]:
        raise ValueError(
            f"SPAR.DATA.SCALE_BOX must be integers (long side, short side), long >= short >= 1, got {scale_box!r}"
        )
    if not _is_pair(scale_range, numbers.Real) or not 0 < scale_range[0] <= scale_range[1] < math.inf:
        raise ValueError(f"SPAR.DATA.SCALE_RANGE must be (low, high), 0 < low <= high, got {scale_range!r}")
    lengths = {"MIN_SHORT_SIDE": min_short_side, "CROP_MIN_SIDE": crop_min_side, "SIDE_MULTIPLE": side_multiple}
    for key, length in lengths.items():
        if not _is_number(length, numbers.Integral) or length < 1:
            raise ValueError(f"SPAR.DATA.{key} must be an integer of at least 1, in pixels, got {length!r}")
    if min_short_side > scale_box[1]:
        raise ValueError(
            f"SPAR.DATA.MIN_SHORT_SIDE must be at most SCALE_BOX's short side {scale_box[1]}, got {min_short_side}"
        )
    fractions = {"CROP_PROB": crop_prob, "CROP_MIN_FRACTION": crop_min_fraction, "FLIP_PROB": flip_prob}
    for key, fraction in fractions.items():
        if not _is_number(fraction, numbers.Real) or not 0 <= fraction <= 1:
            raise ValueError(f"SPAR.DATA.{key} must be in 0..1, got {fraction!r}")
    box, factor = (scale_box[0], scale_box[1]), (scale_range[0], scale_range[1])
    return [
        ScaleAndCrop(box, factor, min_short_side, crop_prob, crop_min_fraction, crop_min_side, side_multiple),
        T.RandomFlip(flip_prob),
    ]


def _is_pair(value: object, kind: type) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(part, kind) for part in value)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
