"""Draws the predictions of a demo beside the ground truth of a data set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from spar_d2.data.images import read_rgb
from spar_d2.demo.panoptic import PanopticDemo
from spar_d2.demo.predictor import Demo, Prediction
from spar_d2.evaluation.panoptic.coco_json import read_ground_truth
from spar_d2.utils.images import read_ids
from spar_d2.utils.label_values import read_label_map
from spar_d2.visualization.overlay import draw_overlay
from spar_d2.visualization.palette import IGNORED, IGNORED_COLOR

Reader = Callable[[dict], Prediction]


def truth_reader(demo: Demo, dataset: str) -> Reader:
    """Return a function that reads the ground truth of a dataset dict in the classes of a demo.

    The class index after the last name stands for ignored pixels.

    Raises:
        ValueError: the data set has no ground truth for the demo's model, or other classes.
    """
    return _panoptic_reader(demo, dataset) if isinstance(demo, PanopticDemo) else _semantic_reader(demo, dataset)


def _semantic_reader(demo: Demo, dataset: str) -> Reader:
    metadata = MetadataCatalog.get(dataset)
    classes, ignored = metadata.get("stuff_classes") or (), metadata.get("ignore_label", 255)
    if len(classes) != len(demo.names):
        raise ValueError(f"{dataset} has {len(classes)} classes, but the model has {len(demo.names)}")

    def read(record: dict) -> Prediction:
        if "sem_seg_file_name" not in record:
            raise ValueError(f"{dataset}: {record['file_name']} has no label map (sem_seg_file_name)")
        labels = read_label_map(record).astype(np.int64)
        labels[(labels == ignored) | (labels >= len(classes)) | (labels < 0)] = len(classes)
        return Prediction(labels, None, (labels.shape[0], labels.shape[1]))

    return read


def _panoptic_reader(demo: PanopticDemo, dataset: str) -> Reader:
    if not demo.category_index:
        raise ValueError(f'MODEL.SPAR.VOCABULARY must be "" here: the ground truth has the classes of {dataset}')
    # Loading the data set may set the paths.
    DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("panoptic_json"):
        raise ValueError(f"the data set {dataset!r} has no panoptic_json in its metadata, so it has no panoptic labels")
    truth = read_ground_truth(metadata.panoptic_json, metadata.panoptic_root)
    missing = sorted(set(truth.names) - set(demo.category_index))
    if missing:
        raise ValueError(f"{dataset} has the category {truth.names[missing[0]]!r}, which the model does not have")

    def read(record: dict) -> Prediction:
        image_id = truth.find(record["image_id"])
        if image_id is None:
            raise ValueError(f"{metadata.panoptic_json} has no image {record['image_id']!r}")
        ids = read_ids(truth.folder / truth.images[image_id].file_name).astype(np.int64)
        labels = np.zeros(ids.shape, dtype=np.int64)
        for segment in truth.images[image_id].segments:
            labels[ids == segment.id] = demo.category_index[segment.category]
        return Prediction(labels, None, (ids.shape[0], ids.shape[1]), segments=ids)

    return read


def draw_beside_truth(demo: Demo, record: dict, read: Reader) -> tuple[list[np.ndarray], np.ndarray, set[int]]:
    """Run a demo on the image of a dataset dict and draw its prediction and the ground truth.

    Args:
        demo: demo of a model.
        record: dataset dict.
        read: result of :func:`truth_reader`.

    Returns:
        The image, the ground truth and the prediction, each (H, W, 3) uint8; the ground truth and the prediction side
        by side, with a legend, (H', W', 3) uint8; and the class indices in both.

    Raises:
        ValueError: the image and its ground truth differ in size.
    """
    image = read_rgb(record["file_name"])
    truth, seen = read(record), demo.see(image)
    true_labels, labels = truth.needed_labels(), seen.needed_labels()
    if true_labels.shape != labels.shape:
        sizes = f"{true_labels.shape[::-1]} and {labels.shape[::-1]}"
        raise ValueError(f"the labels and the image {record['file_name']} differ in size (W, H): {sizes}")
    names, colors = [*demo.names, IGNORED], [*demo.colors, IGNORED_COLOR]
    drawn = [
        draw_overlay(image, part, names, colors, demo.alpha, legend=False, segments=segments)
        for part, segments in ((true_labels, truth.segments), (labels, seen.segments))
    ]
    present = np.union1d(true_labels, labels).tolist()
    listed = [number for number in present if number < len(demo.names)]
    both = draw_overlay(
        image, true_labels, names, colors, demo.alpha, listed=listed, beside=drawn[1:], segments=truth.segments
    )
    return [image, *drawn], both, set(present)
