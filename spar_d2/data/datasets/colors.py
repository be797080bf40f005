"""Class colors. Needs no Detectron2."""

from __future__ import annotations

import numpy as np


def voc_colors(count: int = 256) -> np.ndarray:
    """Pascal VOC's color map: distinct colors, of which the first is black, for the background.

    The bits of a label, from the lowest to the highest, are assigned to red, green and blue in turn, and fill each
    channel from its highest bit down.

    Returns:
        (count, 3) uint8 RGB.
    """
    labels = np.arange(count)
    colors = np.zeros((count, 3), dtype=np.uint8)
    for channel in range(3):
        for level in range(3):
            bit = (labels >> (3 * level + channel)) & 1
            colors[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return colors
