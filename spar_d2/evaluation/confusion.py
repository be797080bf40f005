"""Counting and scoring of label maps, in numpy alone."""

from __future__ import annotations

import numpy as np


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
    counted = (truth != ignore_label) & (truth >= 0) & (truth < classes)
    prediction, truth = prediction[counted].astype(np.int64), truth[counted].astype(np.int64)
    prediction = np.where((prediction >= 0) & (prediction < classes), prediction, classes)
    return np.bincount(truth * (classes + 1) + prediction, minlength=classes * (classes + 1)).reshape(classes, -1)


def segmentation_scores(confusion: np.ndarray, names: list[str]) -> dict[str, float]:
    """Scores in percent from a confusion matrix.

    Args:
        confusion: (C, C + 1) as from :func:`confusion_matrix`, summed over images.
        names: of the C classes.

    Returns:
        ``mIoU`` and ``mACC`` over the classes present in the ground truth (Detectron2's rule); ``mIoU-all`` over all
        classes that are present or predicted; ``fwIoU``, weighted by frequency; ``pACC``, share of right pixels;
        ``IoU-name`` and ``ACC-name`` for every class (nan where it is undefined).
    """
    confusion = confusion.astype(np.float64)
    right = np.diagonal(confusion)
    true, predicted = confusion.sum(1), confusion[:, :-1].sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        iou, accuracy = right / (true + predicted - right), right / true
        present = true > 0
        scores = {
            "mIoU": iou[present].mean() if present.any() else np.nan,
            "mIoU-all": np.nanmean(iou) if present.any() else np.nan,
            "fwIoU": (iou[present] * true[present]).sum() / true.sum(),
            "mACC": accuracy[present].mean() if present.any() else np.nan,
            "pACC": right.sum() / true.sum(),
        }
    scores.update({f"IoU-{name}": value for name, value in zip(names, iou)})
    scores.update({f"ACC-{name}": value for name, value in zip(names, accuracy)})
    return {name: 100 * float(value) for name, value in scores.items()}
