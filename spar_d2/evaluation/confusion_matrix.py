"""Confusion matrices and scores of label maps. Needs only NumPy and OpenCV."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np

# Distance of a boundary in fractions of the image diagonal (Cheng et al., "Boundary IoU", CVPR 2021).
_BOUNDARY_RATIO = 0.02


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, classes: int, ignore_label: int = 255) -> np.ndarray:
    """Compute the confusion matrix of two label maps.

    Args:
        prediction: (H, W) integers; values outside 0..classes-1 count as wrong.
        truth: (H, W) integers; pixels with ``ignore_label`` or values outside 0..classes-1 are ignored.
        classes: number of classes C.

    Returns:
        (C, C + 1) int64, with true classes as rows and predicted classes as columns. The last column counts predictions
        that are not a class.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth must have the same size, got {prediction.shape} and {truth.shape}")
    # Values that are not a class become class C, whose row is dropped.
    columns = _scaled(prediction, classes, None, 1)
    pairs = _scaled(truth, classes, ignore_label, classes + 1)
    pairs += columns
    return np.bincount(pairs.ravel(), minlength=(classes + 1) ** 2).reshape(classes + 1, -1)[:classes]


def boundary_confusion_matrix(
    prediction: np.ndarray, truth: np.ndarray, classes: int, ignore_label: int = 255
) -> np.ndarray:
    """Compute the confusion matrix of Detectron2's boundary IoU.

    As in Detectron2, each map is reduced to its boundary: the minimum label within 2 % of the image diagonal is
    subtracted from every label, with 0 outside the image, and the differences are counted as labels. For 16 classes or
    more, Detectron2's 8-bit arithmetic overflows; the results here are those without overflow.

    Arguments and result as in :func:`confusion_matrix`; ``ignore_label`` is mapped to the number of classes.

    Raises:
        ValueError: the shapes differ, or there are 255 classes or more, which Detectron2 does not support either.
    """
    if classes >= 255:
        raise ValueError(f"boundary IoU supports fewer than 255 classes, got {classes}")
    maps = (_scaled(labels, classes, ignored, 1) for labels, ignored in ((prediction, None), (truth, ignore_label)))
    predicted, actual = map(_boundary, maps)
    return confusion_matrix(predicted, actual, classes, ignore_label=classes)


def _boundary(labels: np.ndarray) -> np.ndarray:
    labels = labels.astype(np.uint8)
    distance = max(1, round(_BOUNDARY_RATIO * float(np.hypot(*labels.shape))))
    kernel = np.ones((3, 3), np.uint8)
    inner = cv2.erode(labels, kernel, iterations=distance, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return labels - inner


def _scaled(labels: np.ndarray, classes: int, ignore_label: int | None, factor: int) -> np.ndarray:
    """Multiply labels by a factor, after mapping ignored and invalid labels to ``classes``."""
    # Narrow dtypes reduce memory traffic.
    kind = np.uint16 if (classes + 1) ** 2 <= 1 << 16 else np.int64
    if labels.dtype != np.uint8 and labels.size and labels.min() >= 0 and labels.max() <= 255:
        labels = labels.astype(np.uint8)
    values = np.arange(256) if labels.dtype == np.uint8 else labels
    valid = (values >= 0) & (values < classes)
    if ignore_label is not None:
        valid &= values != ignore_label
    scaled = np.where(valid, values, classes).astype(kind) * kind(factor)
    return scaled[labels] if labels.dtype == np.uint8 else scaled


def segmentation_scores(
    confusion: np.ndarray, names: list[str], boundary: np.ndarray | None = None
) -> dict[str, float]:
    """Compute scores in percent from a confusion matrix.

    Args:
        confusion: (C, C + 1) sum of :func:`confusion_matrix` over images.
        names: names of the C classes.
        boundary: sum of :func:`boundary_confusion_matrix`, optional.

    Returns:
        ``mIoU`` and ``mACC``, averaged over classes in the ground truth, as in Detectron2; ``mIoU-all``, averaged over
        classes in the ground truth or the predictions; ``fwIoU``, weighted by class frequency; ``pACC``, the fraction
        of correct pixels; ``IoU-name`` and ``ACC-name`` for every class, nan if it is not in the ground truth. Names
        that several classes share are followed by the class index, as in "IoU-tree (4)". With ``boundary``, also
        ``BoundaryIoU-name`` and ``min(IoU, B-Iou)-name``. All scores but ``mIoU-all`` equal Detectron2's; boundary
        scores do so for less than 16 classes.
    """
    right, actual, iou = _overlap(confusion)
    uses = Counter(names)
    names = [name if uses[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    with np.errstate(divide="ignore", invalid="ignore"):
        accuracy = right / actual
        present = actual > 0
        scores = {
            "mIoU": iou[present].mean() if present.any() else np.nan,
            "mIoU-all": np.nanmean(iou) if present.any() else np.nan,
            "fwIoU": (iou[present] * actual[present]).sum() / actual.sum(),
            "mACC": accuracy[present].mean() if present.any() else np.nan,
            "pACC": right.sum() / actual.sum(),
        }
    iou = np.where(present, iou, np.nan)
    scores.update({f"IoU-{name}": value for name, value in zip(names, iou)})
    scores.update({f"ACC-{name}": value for name, value in zip(names, accuracy)})
    if boundary is not None:
        edges = _overlap(boundary)[2]
        scores.update({f"BoundaryIoU-{name}": value for name, value in zip(names, edges)})
        # If only the boundary IoU is undefined, use the IoU.
        lower = np.where(present, np.fmin(iou, edges), np.nan)
        scores.update({f"min(IoU, B-Iou)-{name}": value for name, value in zip(names, lower)})
    return {name: 100 * float(value) for name, value in scores.items()}


def _overlap(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of correct pixels, the number of true pixels, and the IoU of every class."""
    confusion = confusion.astype(np.float64)
    right, actual, predicted = np.diagonal(confusion), confusion.sum(1), confusion[:, :-1].sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return right, actual, right / (actual + predicted - right)
