"""Class colors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

_BACKGROUND = (0, 0, 0)
# Step between channel values: 18 values. More than 3,000 of their colors are neither too dark nor too pale.
_STEP = 15
# Colors to stay distinct from: the background, and the white of margins and outlines.
_RESERVED = ((0, 0, 0), (255, 255, 255))

# Name and color of ignored pixels in legends and pictures.
IGNORED = "(ignored)"
IGNORED_COLOR = (225, 225, 225)


def class_colors(classes: int | Sequence[str]) -> list[tuple[int, int, int]]:
    """Return distinct colors, which depend only on the class index.

    Each color is as different as possible from all previous ones, so that a class keeps its color if classes are
    appended. About 3,000 colors are unique, then they repeat.

    Args:
        classes: number of classes, or their names. A first class named "background" becomes black.

    Returns:
        (red, green, blue) in 0..255 for each class.
    """
    count = classes if isinstance(classes, int) else len(classes)
    background = not isinstance(classes, int) and count > 0 and classes[0].strip().lower() == "background"
    needed = count - background
    colors = _distinct(min(needed, len(_candidates())))
    colors = [colors[number % len(colors)] for number in range(needed)]
    return [_BACKGROUND, *colors] if background else colors


@functools.lru_cache(maxsize=8)
def _distinct(count: int) -> list[tuple[int, int, int]]:
    """Repeatedly choose the candidate that is farthest from all chosen colors."""
    candidates = _candidates()
    lab = _lab(candidates)
    distance = np.min([((lab - taken) ** 2).sum(1) for taken in _lab(np.array(_RESERVED))], axis=0)
    chosen = []
    for _ in range(count):
        best = int(distance.argmax())
        chosen.append(tuple(int(value) for value in candidates[best]))
        distance = np.minimum(distance, ((lab - lab[best]) ** 2).sum(1))
        distance[best] = -1
    return chosen


@functools.lru_cache(maxsize=1)
def _candidates() -> np.ndarray:
    """Return candidates (n, 3) RGB in 0..255 that are not nearly black, white, gray or too vivid."""
    levels = np.arange(0, 256, _STEP)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(colors)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    return colors[(lab[:, 0] > 32) & (lab[:, 0] < 90) & (chroma > 24) & (chroma < 90)]


def _lab(colors: np.ndarray) -> np.ndarray:
    """Convert sRGB (n, 3) in 0..255 to CIE L*a*b* (D65), where distances approximate perceived differences.

    Rounded, so that comparisons of distances do not depend on a machine's floating-point arithmetic.
    """
    rgb = colors / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    # Relative to white, which is (1, 1, 1) in RGB.
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1).round(3)
