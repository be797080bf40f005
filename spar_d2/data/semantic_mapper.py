"""Detectron2's mapper with this package's readers: label maps by their numbers, images of known formats alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from torch.utils.data import get_worker_info

from spar_d2.data.datasets.scenes import IGNORE_LABEL
from spar_d2.utils.images import check_image_file, of_one_class, read_labels

logger = logging.getLogger(__name__)

# Of 16 bits, all of which augmentations set in pixels that they add.
_ADDED = 2**16 - 1
# Label maps without a second class, one after another, before that is told.
_PATIENCE = 8


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

    Label maps in which the second class may have been ignored, such as masks of 0 and 255, are told once.

    Args:
        ignore_label: of pixels that augmentations add where labels have 16 bits; 65535 there is ignored, too.
        classes: how many there are.
        arguments: of ``DatasetMapper``.
    """

    @configurable
    def __init__(self, *, ignore_label: int = IGNORE_LABEL, classes: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._ignored, self._seen, self._patience = ignore_label, set(), _PATIENCE if classes > 1 else 0
        self.augmentations = _WithLabels(self.augmentations, ignore_label)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        own = {"ignore_label": head.IGNORE_VALUE, "classes": head.NUM_CLASSES}
        return {**super().from_config(cfg, is_train), **own}

    def __call__(self, dataset_dict: dict) -> dict:
        """A dataset dict with what it names: "image", and "sem_seg" (H, W) int64 where it has a label map.

        Raises:
            FileNotFoundError, ValueError: as :class:`ImageMapper` and :func:`spar_d2.utils.images.read_labels`.
        """
        file = dataset_dict.get("sem_seg_file_name")
        labels = None if file is None else read_labels(file)
        if self._patience and file is not None and labels is not None:
            self._look_at(labels, file)
        self.augmentations.labels = labels
        return super().__call__(dataset_dict)

    def _look_at(self, labels: np.ndarray, file: str) -> None:
        """Until a second class was seen, or the first label maps have none."""
        self._seen.update(np.unique(labels).tolist())
        classes = self._seen - {self._ignored}
        self._patience = self._patience - 1 if len(classes) < 2 else 0
        # Of several loading processes, one says it.
        worker = get_worker_info()
        is_first = worker is None or worker.id == 0
        if len(classes) < 2 and not self._patience and self._ignored in self._seen and is_first:
            what = of_one_class(classes, self._ignored)
            logger.warning("DATASETS.TRAIN, %d label maps up to %s: %s", _PATIENCE, file, what)


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
