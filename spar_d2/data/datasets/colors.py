"""A color for every class. Needs no Detectron2."""

from __future__ import annotations

import numpy as np


def voc_colors(count: int = 256) -> np.ndarray:
    """Pascal VOC's colors of labels, all different; the first is black, that of its background.

    The bits of a label k are dealt to red, green and blue in turn, the lowest first, and fill each from its highest
    bit down.

    Returns:
        (count, 3) uint8 RGB.
    """
    labels = np.arange(count)
    colors = np.zeros((count, 3), dtype=np.uint8)
    for channel in range(3):
        for place in range(3):
            bit = (labels >> (3 * place + channel)) & 1
            colors[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colors
