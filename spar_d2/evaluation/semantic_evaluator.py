"""Detectron2 evaluator for semantic segmentation."""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from pathlib import Path
from typing import cast

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from pycocotools import mask as coco_mask

from spar_d2.evaluation.confusion_matrix import boundary_confusion_matrix, confusion_matrix, segmentation_scores
from spar_d2.evaluation.device_confusion import DeviceConfusion
from spar_d2.utils.images import of_one_class
from spar_d2.utils.io import write_json
from spar_d2.utils.label_values import read_label_map
from spar_d2.utils.processes import gather_when_done

logger = logging.getLogger(__name__)

_WARNED: set[tuple] = set()
# Maximum number of values or classes listed in a warning.
_MAX_LISTED = 8
_SUMMARY = ("mIoU", "mIoU-all", "fwIoU", "mACC", "pACC")


class SemanticEvaluator(DatasetEvaluator):
    """Computes intersection over union (IoU) and accuracies of predicted labels.

    Supports the outputs of this package's segmentor ("sem_seg_labels") and of Detectron2's models ("sem_seg"). Ground
    truth is read from the file "sem_seg_file_name" of the input or, if the input has none, of the data set's record of
    the image. If that has none either, the input's "sem_seg" is used.

    Args:
        dataset_name: name of a registered data set; its metadata must have "stuff_classes" and may have "ignore_label".
        distributed: sum the counts of all processes; only the main process returns scores.
        output_dir: folder to which the scores are written ("sem_seg_scores.json"); None writes nothing.
        dump_predictions: also write the predictions to ``output_dir`` ("sem_seg_predictions.json", with one
            run-length-encoded mask per image and class, as Detectron2 does).
        boundary_iou: also compute Detectron2's boundary IoU of every class, which takes several times as long.

    Raises:
        ValueError: the data set has no class names, or too many for boundary IoU; or ``dump_predictions`` is set
            without an ``output_dir``.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | os.PathLike | None = None,
        dump_predictions: bool = False,
        boundary_iou: bool = False,
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        names = metadata.get("stuff_classes")
        if not names:
            raise ValueError(f"the data set {dataset_name!r} has no stuff_classes in its metadata, nothing to evaluate")
        self.names: list[str] = names
        if dump_predictions and not output_dir:
            raise ValueError("dump_predictions needs an output_dir to write to")
        if boundary_iou and len(self.names) >= 255:
            raise ValueError(f"boundary_iou supports fewer than 255 classes, {dataset_name!r} has {len(self.names)}")
        self.dataset_name = dataset_name
        self.distributed = distributed
        self.output_dir = Path(output_dir) if output_dir else None
        self.dump_predictions = dump_predictions
        self.boundary_iou = boundary_iou
        self.ignore_label = metadata.get("ignore_label", 255)
        dataset_ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_id = {ours: theirs for theirs, ours in dataset_ids.items()}
        self._truths: dict[str, dict] | None = None
        self.reset()

    def reset(self) -> None:
        shape = (len(self.names), len(self.names) + 1)
        self._confusion = np.zeros(shape, dtype=np.int64)
        self._on_device: DeviceConfusion | None = None
        self._boundary = np.zeros(shape, dtype=np.int64) if self.boundary_iou else None
        self._dumped: list[dict] = []
        # Maps labels that are neither a class nor ignored to their number of pixels.
        self._unknown: Counter[int] = Counter()
        self._pixels = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Process a batch.

        Raises:
            ValueError: an output has no labels or scores, an image has no ground truth, or its prediction and ground
                truth differ in size.
        """
        for record, output in zip(inputs, outputs):
            labels, truth = self._labels(output), self._truth(record)
            if labels.shape != truth.shape:
                raise ValueError(
                    f"prediction and ground truth of {record.get('file_name', 'an image')} differ in size: "
                    f"{tuple(labels.shape)} and {truth.shape}"
                )
            self._count(labels, truth)
            self._count_unknown(truth)
            self._pixels += truth.size
            if self._boundary is not None:
                arguments = (labels.cpu().numpy(), truth, len(self.names), self.ignore_label)
                self._boundary += boundary_confusion_matrix(*arguments)
            if self.dump_predictions:
                self._dumped += self._encode(labels.cpu().numpy(), record.get("file_name", ""))

    def _count(self, labels: torch.Tensor, truth: np.ndarray) -> None:
        """Add to the confusion matrix, on the device of the predicted labels.

        On a GPU, it is faster to copy the ground truth to the device than to copy the predicted labels to the CPU.
        """
        if not labels.is_cuda:
            self._confusion += confusion_matrix(labels.cpu().numpy(), truth, len(self.names), self.ignore_label)
            return
        if self._on_device is None or self._on_device.device != labels.device:
            self._flush_device_counts()
            self._on_device = DeviceConfusion(len(self.names), self.ignore_label, labels.device)
        self._on_device.add(labels, truth)

    def _count_unknown(self, truth: np.ndarray) -> None:
        """Count pixels whose label is neither a class nor ignored. These pixels are excluded from all scores."""
        unknown = ((truth >= len(self.names)) | (truth < 0)) & (truth != self.ignore_label)
        if unknown.any():
            self._unknown.update(dict(zip(*(part.tolist() for part in np.unique(truth[unknown], return_counts=True)))))

    def _flush_device_counts(self) -> None:
        if self._on_device is not None:
            self._confusion += self._on_device.total()
            self._on_device = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the counts so far, for :meth:`load_state_dict`; masks for ``dump_predictions`` are not included."""
        self._flush_device_counts()
        counts = {"confusion": self._confusion, "strange": np.array(sorted(self._unknown.items())).reshape(-1, 2)}
        counts["pixels"] = np.array(self._pixels)
        return counts if self._boundary is None else {**counts, "boundary": self._boundary}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore the counts of :meth:`state_dict`. Raises ``ValueError`` if they do not fit classes and options."""
        other_keys = ("strange", "pixels")
        current, loaded = (
            {k: v for k, v in counts.items() if k not in other_keys} for counts in (self.state_dict(), state)
        )
        if {name: counts.shape for name, counts in current.items()} != {name: loaded[name].shape for name in loaded}:
            raise ValueError(f"these counts do not match the {len(self.names)} classes of {self.dataset_name!r}")
        for name, counts in current.items():
            counts[:] = loaded[name]
        self._unknown = Counter(dict(state.get("strange", np.zeros((0, 2), int)).tolist()))
        self._pixels = int(state.get("pixels", 0))

    def evaluate(self) -> OrderedDict | None:
        """Return {"sem_seg": scores}, see :func:`segmentation_scores`; None in all processes but the main one."""
        self._flush_device_counts()
        confusion, boundary, dumped, unknown = self._confusion, self._boundary, self._dumped, self._unknown
        pixels = self._pixels
        if self.distributed:
            gathered = gather_when_done((confusion, boundary, dumped, unknown, pixels))
            if not comm.is_main_process():
                return None
            confusions, boundaries, dumps, unknown_counts, sizes = zip(*gathered)
            confusion = np.sum(confusions, axis=0)
            boundary = np.sum(boundaries, axis=0) if self.boundary_iou else None
            dumped = [mask for part in dumps for mask in part]
            unknown, pixels = sum(unknown_counts, Counter()), sum(sizes)
        self._warn(unknown, confusion, pixels - int(confusion.sum()) - sum(unknown.values()))
        scores = segmentation_scores(confusion, self.names, boundary)
        if self.output_dir:
            write_json(scores, self.output_dir / "sem_seg_scores.json")
            if self.dump_predictions:
                write_json(dumped, self.output_dir / "sem_seg_predictions.json")
        summary = ", ".join(f"{name} {scores[name]:.2f}" for name in _SUMMARY)
        logger.info("%s: %s", self.dataset_name, summary)
        return OrderedDict(sem_seg=scores)

    def _warn(self, unknown: Counter[int], confusion: np.ndarray, ignored: int) -> None:
        """Warn about unknown labels, ignored pixels and absent classes, once per data set and set of findings.

        Args:
            unknown: maps unknown labels to their number of pixels.
            confusion: confusion matrix.
            ignored: number of ignored pixels.
        """
        finding = (self.dataset_name, tuple(sorted(unknown.items())), tuple(np.any(confusion, axis=1).tolist()))
        if finding in _WARNED:
            return
        _WARNED.add(finding)
        if unknown:
            listed = ", ".join(f"{value} in {pixels}" for value, pixels in sorted(unknown.items())[:_MAX_LISTED])
            logger.warning(
                "%s: %d values in its label maps are neither a class (0..%d) nor ignored (%d), and their pixels are "
                "excluded: %s%s pixels. If the labels start at 1, subtract 1 from the label maps; a value without a "
                "meaning can be set as the ignore_label in the metadata of the data set",
                self.dataset_name, len(unknown), len(self.names) - 1, self.ignore_label,
                listed, ", ..." if len(unknown) > _MAX_LISTED else "",
            )  # fmt: skip
        seen = np.flatnonzero(confusion.any(1)).tolist()
        if ignored > 0 and len(seen) < min(2, len(self.names)):
            logger.warning("%s: %s", self.dataset_name, of_one_class(seen, self.ignore_label))
        absent = [name for name, row in zip(self.names, confusion) if not row.any()]
        if absent:
            more = ", ..." if len(absent) > _MAX_LISTED else ""
            logger.warning(
                "%s: %d of the %d classes (%s%s) have no pixels: they have no IoU, and are excluded from the mIoU",
                self.dataset_name, len(absent), len(self.names), ", ".join(absent[:_MAX_LISTED]), more,
            )  # fmt: skip

    def _truth(self, record: dict) -> np.ndarray:
        source = record if record.get("sem_seg_file_name") else self._truth_record(record.get("file_name"))
        if source is None:
            # Last resort: mappers may have resized it with the image.
            if "sem_seg" in record:
                return np.asarray(record["sem_seg"])
            raise ValueError(f"{self.dataset_name} has no ground truth for the image {record.get('file_name')}")
        return read_label_map(source)

    def _truth_record(self, image: str | None) -> dict | None:
        """Look up the dataset dict of an image, because mappers drop the label file in testing."""
        if self._truths is None:
            known = self.dataset_name in DatasetCatalog
            dicts = DatasetCatalog.get(self.dataset_name) if known else []
            self._truths = {d["file_name"]: d for d in dicts if "sem_seg_file_name" in d}
        return None if image is None else self._truths.get(image)

    def _labels(self, output: dict) -> torch.Tensor:
        """Return the predicted labels, (H, W) integers, on the device of the output."""
        if "sem_seg_labels" in output:
            return output["sem_seg_labels"]
        if "sem_seg" in output:
            return output["sem_seg"].argmax(dim=0)
        raise ValueError(f'SemanticEvaluator needs "sem_seg_labels" or "sem_seg" in an output, got {sorted(output)}')

    def _encode(self, labels: np.ndarray, file_name: str) -> list[dict]:
        masks = []
        for label in np.unique(labels):
            encoded = coco_mask.encode(np.asfortranarray(labels == label))
            counts = cast("bytes", encoded["counts"])  # the type stubs are wrong
            segmentation = {**encoded, "counts": counts.decode()}
            category = int(self._dataset_id.get(int(label), label))
            masks.append({"file_name": file_name, "category_id": category, "segmentation": segmentation})
        return masks
