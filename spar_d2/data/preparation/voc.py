"""Pascal VOC 2012, with a background class (voc21) and without (voc20)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spar_d2.data.datasets import class_names
from spar_d2.data.datasets.colors import voc_colors
from spar_d2.data.preparation.common import (
    ArchiveSpec,
    ClassLabels,
    Labels,
    Preparation,
    names_in_list,
    read_pixels,
    read_values,
    with_background,
    without_background,
)

_VOC = ArchiveSpec(
    ("VOCdevkit/VOC2012", "VOC2012"), "VOCtrainval_11-May-2012.tar", "host.robots.ox.ac.uk/pascal/VOC/voc2012"
)


class VocPreparation(Preparation):
    """Labels 0 (background) to 20, and 255 (borders). Without a background class, 0 is ignored and 1 becomes 0.

    Args:
        name: name of the data set.
        background: whether the background is a class.
        split: "val" or "train".
    """

    def __init__(self, name: str, background: bool, split: str = "val") -> None:
        super().__init__(name, split)
        count = len(class_names.VOC)
        self.table = with_background(count + 1) if background else without_background(count)

    def images(self, root: Path) -> dict[str, Path]:
        names = names_in_list(_VOC.find(root, f"ImageSets/Segmentation/{self.split}.txt"))
        folder = _VOC.find(root, "JPEGImages")
        return {name: folder / f"{name}.jpg" for name in names}

    def labels(self, root: Path) -> Labels:
        folder = _VOC.find(root, "SegmentationClass")
        return ClassLabels(lambda name: folder / f"{name}.png", self.table, read_voc_labels)


def read_voc_labels(path: Path) -> np.ndarray:
    """Read the labels (H, W) of a VOC label image: palette indices in official files, RGB colors in copies.

    Raises:
        ValueError: the image cannot be read, or has colors outside the VOC color map.
    """
    mode, pixels = read_pixels(path)
    if mode not in ("RGB", "RGBA"):
        return read_values(path)
    known = _codes(voc_colors())
    order = np.argsort(known)
    codes = _codes(pixels)
    values = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
    wrong = known[values] != codes
    if wrong.any():
        red, green, blue = pixels[wrong][0, :3].tolist()
        raise ValueError(f"the label image {path} has the color ({red}, {green}, {blue}), which is not a VOC color")
    return values


def _codes(colors: np.ndarray) -> np.ndarray:
    """Pack uint8 RGB colors (..., 3 or more) into integers."""
    red, green, blue = np.moveaxis(colors[..., :3].astype(np.int64), -1, 0)
    return red << 16 | green << 8 | blue
