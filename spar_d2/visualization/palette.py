"""A color for every class."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

_BACKGROUND = (0, 0, 0)
# Steps between the levels of a channel: 18 levels, of which those that are neither dark nor pale are well over 3,000.
_STEP = 15
# What is distinct from these too: the background, the white of margins and outlines.
_TAKEN = ((0, 0, 0), (255, 255, 255))


def class_colors(classes: int | Sequence[str]) -> list[tuple[int, int, int]]:
    """Colors that are easy to tell apart, the same for the same number of a class.

    Each is as different as can be from those before it, so that a class keeps its color when others are added at the
    end. Some 3,000 are unique, after that they repeat.

    Args:
        classes: how many, or their names; a first class of the name "background" becomes black.

    Returns:
        (red, green, blue) in 0..255 for each class.
    """
    count = classes if isinstance(classes, int) else len(classes)
    background = not isinstance(classes, int) and count > 0 and classes[0].strip().lower() == "background"
    wanted = count - background
    colors = _distinct(min(wanted, len(_candidates())))
    colors = [colors[number % len(colors)] for number in range(wanted)]
    return [_BACKGROUND, *colors] if background else colors


@functools.lru_cache(maxsize=8)
def _distinct(count: int) -> list[tuple[int, int, int]]:
    """The candidate that is farthest from all that were taken, again and again."""
    candidates = _candidates()
    places = _lab(candidates)
    distance = np.min([((places - taken) ** 2).sum(1) for taken in _lab(np.array(_TAKEN))], axis=0)
    chosen = []
    for _ in range(count):
        best = int(distance.argmax())
        chosen.append(tuple(int(value) for value in candidates[best]))
        distance = np.minimum(distance, ((places - places[best]) ** 2).sum(1))
        distance[best] = -1
    return chosen


@functools.lru_cache(maxsize=1)
def _candidates() -> np.ndarray:
    """(n, 3) RGB in 0..255: neither nearly black or white, nor gray, nor glaring."""
    levels = np.arange(0, 256, _STEP)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(colors)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    return colors[(lab[:, 0] > 32) & (lab[:, 0] < 90) & (chroma > 24) & (chroma < 90)]


def _lab(colors: np.ndarray) -> np.ndarray:
    """(n, 3) sRGB in 0..255 to CIE L*a*b* under D65, where distance is about how different colors look.

    Rounded, so that which of two colors is farther does not hang on the last bit of a machine's arithmetic.
    """
    rgb = colors / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    # Relative to white, which is (1, 1, 1) in RGB.
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1).round(3)
