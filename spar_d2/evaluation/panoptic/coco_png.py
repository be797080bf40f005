"""Reads, writes and compares panoptic PNGs, whose colors encode segment ids."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spar_d2.evaluation.panoptic.coco_json import FoundImage, GroundTruth
from spar_d2.evaluation.panoptic.quality import panoptic_quality
from spar_d2.evaluation.panoptic.scores import PanopticCounts
from spar_d2.utils.id_maps import IDS, as_colors
from spar_d2.utils.images import read_ids
from spar_d2.utils.io import atomic_write


def compare_image(
    truth: GroundTruth, image_id: int | str, prediction: np.ndarray, predicted: Mapping[int, int]
) -> PanopticCounts:
    """Compare a prediction with the ground truth of an image; see :func:`panoptic_quality` and :func:`read_ids`."""
    image = truth.images[image_id]
    ids = read_ids(truth.folder / image.file_name)
    name = f"{image_id} ({image.file_name})"
    return panoptic_quality(prediction, predicted, ids, image.segments, tuple(truth.names), name)


def compare_folders(
    truth: GroundTruth, folder: Path, predictions: dict[int | str, FoundImage], workers: int
) -> PanopticCounts:
    """Compare all images of the ground truth. Predictions for other images are ignored.

    Args:
        truth: ground truth.
        folder, predictions: see :func:`read_predictions`.
        workers: number of threads.

    Raises:
        ValueError: an image has no prediction, or a PNG cannot be read; or as :func:`panoptic_quality`.
    """
    check_complete(truth, predictions)

    def compare(image_id: int | str) -> PanopticCounts:
        prediction = predictions[image_id]
        return compare_image(truth, image_id, read_ids(folder / prediction.file_name), prediction.categories)

    total = PanopticCounts.zeros(truth.names)
    pool = ThreadPoolExecutor(workers)
    try:
        counts = pool.map(compare, truth.images)
        for image_counts in tqdm(
            counts, total=len(truth.images), desc="comparing", unit="image", disable=None, leave=False
        ):
            total += image_counts
    finally:
        # On an interrupt, do not wait for pending images.
        pool.shutdown(cancel_futures=True)
    return total


def check_complete(truth: GroundTruth, predictions: Container, hint: str = "") -> None:
    """Raise ``ValueError`` if images of the ground truth are not in ``predictions``."""
    missing = [image_id for image_id in truth.images if image_id not in predictions]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of {len(truth.images)} images of the ground truth have no prediction: {shown}{hint}"
        )


def write_ids(ids: np.ndarray, path: str | os.PathLike) -> None:
    """Write segment ids (H, W) as a panoptic PNG.

    Raises:
        ValueError: an id is outside 0..2**24 - 1 and cannot be encoded as a color.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < IDS:
        raise ValueError(f"ids must be in 0..{IDS - 1} to be encoded in {path}, got {ids.min()}..{ids.max()}")
    with atomic_write(path) as temporary:
        Image.fromarray(as_colors(ids)).save(temporary, format="PNG")
