"""Detectron2's dataset mapper, with label maps read by value and a restricted set of image formats."""

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
from spar_d2.utils.images import check_image_file, of_one_class
from spar_d2.utils.label_values import read_label_map

logger = logging.getLogger(__name__)

# 16-bit value of pixels that augmentations add: both of its bytes are 255.
_ADDED = 2**16 - 1
# Number of label maps with a single class before a warning is logged.
_PATIENCE = 8


class ImageMapper(DatasetMapper):
    """Detectron2's mapper for testing. Skips label maps: the evaluator reads them at their original size."""

    def __call__(self, dataset_dict: dict) -> dict:
        """Read and augment the image of a dataset dict.

        Raises:
            FileNotFoundError: the image does not exist.
            ValueError: the image format is not supported.
        """
        check_image_file(dataset_dict["file_name"])
        return super().__call__({key: value for key, value in dataset_dict.items() if key != "sem_seg_file_name"})


def image_mapper(cfg: CfgNode, is_train: bool) -> ImageMapper:
    """Build the mapper from a config: test sizes, or training sizes and augmentations."""
    return ImageMapper(cfg, is_train=is_train)  # pyright: ignore[reportCallIssue]  # @configurable takes a config


class SemanticMapper(ImageMapper):
    """Detectron2's mapper for training, which reads label maps in the same way as the evaluator.

    Detectron2's mapper reads them as gray images, which converts the colors of a palette to gray values and clips
    16-bit values at 255.

    If the first label maps have one class at most, for example because they are masks of 0 and 255, a warning is
    logged.

    Args:
        ignore_label: label of pixels that augmentations add to 16-bit label maps; the value 65535 is mapped to it, too.
        classes: number of classes.
        arguments: arguments of ``DatasetMapper``.
    """

    @configurable
    def __init__(self, *, ignore_label: int = IGNORE_LABEL, classes: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._ignored, self._seen, self._patience = ignore_label, set(), _PATIENCE if classes > 1 else 0
        self.augmentations = _WithLabels(self.augmentations, ignore_label)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        labels = {"ignore_label": head.IGNORE_VALUE, "classes": head.NUM_CLASSES}
        return {**super().from_config(cfg, is_train), **labels}

    def __call__(self, dataset_dict: dict) -> dict:
        """Map a dataset dict to "image", and "sem_seg" (H, W) int64 if it has a label map.

        Raises:
            FileNotFoundError: the image or its label map does not exist.
            ValueError: as :class:`ImageMapper` and :func:`spar_d2.utils.label_values.read_label_map`; or the image and
                its label map differ in size.
        """
        file = dataset_dict.get("sem_seg_file_name")
        labels = None if file is None else read_label_map(dataset_dict)
        if self._patience and file is not None and labels is not None:
            self._look_at(labels, file)
        self.augmentations.labels, self.augmentations.file = labels, file
        return super().__call__(dataset_dict)

    def _look_at(self, labels: np.ndarray, file: str) -> None:
        """Collect the classes of the first label maps, and warn if there is only one."""
        self._seen.update(np.unique(labels).tolist())
        classes = self._seen - {self._ignored}
        self._patience = self._patience - 1 if len(classes) < 2 else 0
        # Only one worker logs the warning.
        worker = get_worker_info()
        is_first = worker is None or worker.id == 0
        if len(classes) < 2 and not self._patience and self._ignored in self._seen and is_first:
            message = of_one_class(classes, self._ignored)
            logger.warning("DATASETS.TRAIN, %d label maps up to %s: %s", _PATIENCE, file, message)


class _WithLabels:
    """Augmentations that also transform ``labels``, (H, W) in the original dtype, or None, from ``file``."""

    def __init__(self, augmentations: Callable[[T.AugInput], T.Transform], ignore_label: int) -> None:
        self.augmentations, self.ignore_label = augmentations, ignore_label
        self.labels: np.ndarray | None = None
        self.file: str | None = None

    def __call__(self, augmented: T.AugInput) -> T.Transform:
        if self.labels is None:
            return self.augmentations(augmented)
        assert augmented.image is not None
        check_same_size(augmented.image.shape[:2], self.labels.shape, self.file)
        # Some augmentations read the labels, but support only 8 bits.
        augmented.sem_seg = self.labels.astype(np.uint8)
        transform = self.augmentations(augmented)
        if self.labels.dtype != np.uint8:
            augmented.sem_seg = _ignoring(joined(transform, self.labels, augmented.sem_seg), self.ignore_label)
        return transform


def check_same_size(image: tuple[int, ...], labels: tuple[int, ...], file: str | None) -> None:
    """Raise ``ValueError`` if the sizes (H, W) of an image and of its label map in ``file`` differ."""
    if tuple(image) != tuple(labels):
        sizes = [f"{size[1]}x{size[0]}" for size in (labels, image)]
        raise ValueError(f"label map: {file} has {sizes[0]} pixels, but its image has {sizes[1]}")


def transformed_labels(transform: T.Transform, labels: np.ndarray, ignore_label: int = IGNORE_LABEL) -> np.ndarray:
    """Apply a Detectron2 transform to a label map (H, W) uint8 or uint16.

    For 16-bit label maps, pixels that the transform adds and pixels of value 65535 become ``ignore_label``.

    Returns:
        (H', W') label map.
    """
    if labels.dtype == np.uint8:
        return transform.apply_segmentation(labels)
    low = transform.apply_segmentation(labels.astype(np.uint8))
    return _ignoring(joined(transform, labels, low), ignore_label)


def joined(transform: T.Transform, numbers: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Apply a transform to values (H, W) uint16, given their transformed low bytes ``low`` (H', W').

    The bytes are transformed separately, because Detectron2 resizes 16-bit arrays with a slight shift against the
    image.
    """
    return low + transform.apply_segmentation((numbers >> 8).astype(np.uint8)) * np.uint16(256)


def _ignoring(labels: np.ndarray, ignore_label: int) -> np.ndarray:
    return np.where(labels == _ADDED, ignore_label, labels.astype(np.int64))
