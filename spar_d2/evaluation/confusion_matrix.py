"""Counting and scoring of label maps, in numpy and OpenCV alone."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np

# Half the width of a boundary, as a share of the image's diagonal (Cheng et al., "Boundary IoU", CVPR 2021).
_BOUNDARY_RATIO = 0.02


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, classes: int, ignore_label: int = 255) -> np.ndarray:
    """How often each true class was given each label, by one ``bincount``.

    Args:
        prediction: (H, W) integers; values outside 0..classes-1 count as wrong.
        truth: (H, W) integers; pixels of ``ignore_label`` or outside 0..classes-1 are left out.
        classes: number of classes C.

    Returns:
        (C, C + 1) int64, rows true, columns predicted; the last column counts labels that are no class.

    Raises:
        ValueError: shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth must have one size, got {prediction.shape} and {truth.shape}")
    # What is no class is class C, whose row is left out.
    columns = _scaled(prediction, classes, None, 1)
    pairs = _scaled(truth, classes, ignore_label, classes + 1)
    pairs += columns
    return np.bincount(pairs.ravel(), minlength=(classes + 1) ** 2).reshape(classes + 1, -1)[:classes]


def boundary_confusion_matrix(
    prediction: np.ndarray, truth: np.ndarray, classes: int, ignore_label: int = 255
) -> np.ndarray:
    """The confusion matrix of Detectron2's boundary IoU.

    Each map is reduced to its boundary, as there: from every label the smallest one within a distance of 2 % of the
    diagonal is subtracted, with 0 outside of the image; what is left is counted under that number. From 16 classes on
    Detectron2 counts wrongly, as its 8-bit numbers overflow; these are the numbers that it would have without that.

    Args, returns: as :func:`confusion_matrix`; pixels of ``ignore_label`` have the number of classes as their label.

    Raises:
        ValueError: shapes differ, or 255 classes or more, for which Detectron2 has none either.
    """
    if classes >= 255:
        raise ValueError(f"boundary IoU is for less than 255 classes, got {classes}")
    maps = (_scaled(labels, classes, ignored, 1) for labels, ignored in ((prediction, None), (truth, ignore_label)))
    found, true = map(_boundary, maps)
    return confusion_matrix(found, true, classes, ignore_label=classes)


def _boundary(labels: np.ndarray) -> np.ndarray:
    labels = labels.astype(np.uint8)
    distance = max(1, round(_BOUNDARY_RATIO * float(np.hypot(*labels.shape))))
    kernel = np.ones((3, 3), np.uint8)
    inner = cv2.erode(labels, kernel, iterations=distance, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return labels - inner


def _scaled(labels: np.ndarray, classes: int, ignore_label: int | None, factor: int) -> np.ndarray:
    """Labels times a factor, where what is no class, or ignored, is class number ``classes``."""
    # The narrower the numbers, the less memory goes through the processor.
    kind = np.uint16 if (classes + 1) ** 2 <= 1 << 16 else np.int64
    if labels.dtype != np.uint8 and labels.size and labels.min() >= 0 and labels.max() <= 255:
        labels = labels.astype(np.uint8)
    values = np.arange(256) if labels.dtype == np.uint8 else labels
    known = (values >= 0) & (values < classes)
    if ignore_label is not None:
        known &= values != ignore_label
    scaled = np.where(known, values, classes).astype(kind) * kind(factor)
    return scaled[labels] if labels.dtype == np.uint8 else scaled


def segmentation_scores(
    confusion: np.ndarray, names: list[str], boundary: np.ndarray | None = None
) -> dict[str, float]:
    """Scores in percent from a confusion matrix.

    Args:
        confusion: (C, C + 1) as from :func:`confusion_matrix`, summed over images.
        names: of the C classes.
        boundary: the same from :func:`boundary_confusion_matrix`, if wanted.

    Returns:
        ``mIoU`` and ``mACC`` over the classes present in the ground truth (Detectron2's rule); ``mIoU-all`` over all
        classes that are present or predicted; ``fwIoU``, weighted by frequency; ``pACC``, share of right pixels;
        ``IoU-name`` and ``ACC-name`` for every class, nan where it is not in the ground truth; a name that several
        classes have is followed by the number of each, as in "IoU-tree (4)". With ``boundary`` also
        ``BoundaryIoU-name`` and ``min(IoU, B-Iou)-name``. All but ``mIoU-all`` are Detectron2's numbers, those of
        boundaries for less than 16 classes.
    """
    right, true, iou = _overlap(confusion)
    uses = Counter(names)
    names = [name if uses[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    with np.errstate(divide="ignore", invalid="ignore"):
        accuracy = right / true
        present = true > 0
        scores = {
            "mIoU": iou[present].mean() if present.any() else np.nan,
            "mIoU-all": np.nanmean(iou) if present.any() else np.nan,
            "fwIoU": (iou[present] * true[present]).sum() / true.sum(),
            "mACC": accuracy[present].mean() if present.any() else np.nan,
            "pACC": right.sum() / true.sum(),
        }
    iou = np.where(present, iou, np.nan)
    scores.update({f"IoU-{name}": value for name, value in zip(names, iou)})
    scores.update({f"ACC-{name}": value for name, value in zip(names, accuracy)})
    if boundary is not None:
        edges = _overlap(boundary)[2]
        scores.update({f"BoundaryIoU-{name}": value for name, value in zip(names, edges)})
        # Where only the boundary is undefined, the other one.
        lower = np.where(present, np.fmin(iou, edges), np.nan)
        scores.update({f"min(IoU, B-Iou)-{name}": value for name, value in zip(names, lower)})
    return {name: 100 * float(value) for name, value in scores.items()}


def _overlap(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every class its right pixels, its true ones, and intersection over union."""
    confusion = confusion.astype(np.float64)
    right, true, predicted = np.diagonal(confusion), confusion.sum(1), confusion[:, :-1].sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return right, true, right / (true + predicted - right)
