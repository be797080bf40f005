"""Detectron2's mapper with this package's readers: label maps by their numbers, images of known formats alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from spar_d2.data.datasets.scenes import IGNORE_LABEL
from spar_d2.utils.images import check_image_file, read_labels

# Of 16 bits, all of which augmentations set in pixels that they add.
_ADDED = 2**16 - 1


class ImageMapper(DatasetMapper):
    """Detectron2's mapper without label maps, for testing: the evaluator reads them, at their own size."""

    def __call__(self, dataset_dict: dict) -> dict:
        """A dataset dict with its image.

        Raises:
            FileNotFoundError: the image is not there.
            ValueError: it is no image of a known format.
        """
        check_image_file(dataset_dict["file_name"])
        return super().__call__({key: value for key, value in dataset_dict.items() if key != "sem_seg_file_name"})


class SemanticMapper(ImageMapper):
    """Detectron2's mapper for training, which reads label maps as the evaluator does.

    Detectron2's own reads them as gray images: a palette's colors become gray values, and 16 bits are cut to 255.

    Args:
        ignore_label: of pixels that augmentations add where labels have 16 bits; 65535 there is ignored, too.
        arguments: of ``DatasetMapper``.
    """

    @configurable
    def __init__(self, *, ignore_label: int = IGNORE_LABEL, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.augmentations = _WithLabels(self.augmentations, ignore_label)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {**super().from_config(cfg, is_train), "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE}

    def __call__(self, dataset_dict: dict) -> dict:
        """A dataset dict with what it names: "image", and "sem_seg" (H, W) int64 where it has a label map.

        Raises:
            FileNotFoundError, ValueError: as :class:`ImageMapper` and :func:`spar_d2.utils.images.read_labels`.
        """
        file = dataset_dict.get("sem_seg_file_name")
        self.augmentations.labels = None if file is None else read_labels(file)
        return super().__call__(dataset_dict)


class _WithLabels:
    """Augmentations that also change ``labels``, (H, W) as they were read or None, and hand them over."""

    def __init__(self, augmentations: Callable[[T.AugInput], T.Transform], ignore_label: int) -> None:
        self.augmentations, self.ignore_label = augmentations, ignore_label
        self.labels: np.ndarray | None = None

    def __call__(self, augmented: T.AugInput) -> T.Transform:
        if self.labels is None:
            return self.augmentations(augmented)
        # Some augmentations look at labels; they know 8 bits only.
        augmented.sem_seg = self.labels.astype(np.uint8)
        transform = self.augmentations(augmented)
        if self.labels.dtype != np.uint8:
            augmented.sem_seg = _ignoring(joined(transform, self.labels, augmented.sem_seg), self.ignore_label)
        return transform


def transformed_labels(transform: T.Transform, labels: np.ndarray, ignore_label: int = IGNORE_LABEL) -> np.ndarray:
    """A label map (H, W) uint8 or uint16 after one of Detectron2's transforms, (H', W').

    Where there are 16 bits, pixels that the transform adds, and those of 65535, get ``ignore_label``.
    """
    if labels.dtype == np.uint8:
        return transform.apply_segmentation(labels)
    low = transform.apply_segmentation(labels.astype(np.uint8))
    return _ignoring(joined(transform, labels, low), ignore_label)


def joined(transform: T.Transform, numbers: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Numbers (H, W) uint16 after a transform, (H', W') uint16, from ``low``, their lower bytes after it.

    In 8 bits, as Detectron2 resizes wider numbers by a rule that shifts them against the image.
    """
    return low + transform.apply_segmentation((numbers >> 8).astype(np.uint8)) * np.uint16(256)


def _ignoring(labels: np.ndarray, ignore_label: int) -> np.ndarray:
    return np.where(labels == _ADDED, ignore_label, labels.astype(np.int64))
