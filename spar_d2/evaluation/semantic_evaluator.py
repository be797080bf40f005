"""Semantic segmentation as a Detectron2 evaluator."""

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
from spar_d2.utils.images import of_one_class, read_labels
from spar_d2.utils.io import write_json
from spar_d2.utils.processes import gather_when_done

logger = logging.getLogger(__name__)

_WARNED: set[tuple] = set()
# Of values or classes in a warning.
_MOST_LISTED = 8
_SUMMARY = ("mIoU", "mIoU-all", "fwIoU", "mACC", "pACC")


class SemanticEvaluator(DatasetEvaluator):
    """Intersection over union of label maps.

    Takes what our segmentor returns ("sem_seg_labels") as well as any Detectron2 model's scores ("sem_seg"). The true
    labels are read from the input's "sem_seg_file_name", or else from what the data set has for its image; where there
    is neither, they are its "sem_seg".

    Args:
        dataset_name: registered name; its metadata must have "stuff_classes" and may have "ignore_label".
        distributed: add up the counts of all processes; the first returns the scores.
        output_dir: if given, write the scores ("sem_seg_scores.json") there and, with ``dump_predictions``, the masks
            ("sem_seg_predictions.json", one run-length-encoded mask per image and class, as Detectron2 does).
        dump_predictions: see ``output_dir``.
        boundary_iou: also compute Detectron2's boundary IoU of every class; it takes several times as long.

    Raises:
        ValueError: the data set has no class names, or too many for boundaries, or masks are to be written but not
            where.
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
            raise ValueError(f"boundary_iou is for less than 255 classes, {dataset_name!r} has {len(self.names)}")
        self.dataset_name = dataset_name
        self.distributed = distributed
        self.output_dir = Path(output_dir) if output_dir else None
        self.dump_predictions = dump_predictions
        self.boundary_iou = boundary_iou
        self.ignore_label = metadata.get("ignore_label", 255)
        dataset_ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_id = {ours: theirs for theirs, ours in dataset_ids.items()}
        self._truth_files: dict[str, str] | None = None
        self.reset()

    def reset(self) -> None:
        shape = (len(self.names), len(self.names) + 1)
        self._confusion = np.zeros(shape, dtype=np.int64)
        self._on_device: DeviceConfusion | None = None
        self._boundary = np.zeros(shape, dtype=np.int64) if self.boundary_iou else None
        self._dumped: list[dict] = []
        # Pixels of labels that are neither a class nor ignored.
        self._strange: Counter[int] = Counter()
        self._pixels = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Count one batch.

        Raises:
            ValueError: an output without labels or scores, an image without ground truth, or sizes that differ.
        """
        for record, output in zip(inputs, outputs):
            labels, truth = self._labels(output), self._truth(record)
            if labels.shape != truth.shape:
                raise ValueError(
                    f"prediction and ground truth of {record.get('file_name', 'an image')} differ in size: "
                    f"{tuple(labels.shape)} and {truth.shape}"
                )
            self._count(labels, truth)
            self._note_strange(truth)
            self._pixels += truth.size
            if self._boundary is not None:
                arguments = (labels.cpu().numpy(), truth, len(self.names), self.ignore_label)
                self._boundary += boundary_confusion_matrix(*arguments)
            if self.dump_predictions:
                self._dumped += self._encode(labels.cpu().numpy(), record.get("file_name", ""))

    def _count(self, labels: torch.Tensor, truth: np.ndarray) -> None:
        """Count where the labels are: fewer bytes of truth go to a GPU than of labels would come from it."""
        if not labels.is_cuda:
            self._confusion += confusion_matrix(labels.cpu().numpy(), truth, len(self.names), self.ignore_label)
            return
        if self._on_device is None or self._on_device.device != labels.device:
            self._take_from_device()
            self._on_device = DeviceConfusion(len(self.names), self.ignore_label, labels.device)
        self._on_device.add(labels, truth)

    def _note_strange(self, truth: np.ndarray) -> None:
        """Remember labels that are neither a class nor ignored, which are left out of all counts."""
        strange = ((truth >= len(self.names)) | (truth < 0)) & (truth != self.ignore_label)
        if strange.any():
            self._strange.update(dict(zip(*(part.tolist() for part in np.unique(truth[strange], return_counts=True)))))

    def _take_from_device(self) -> None:
        if self._on_device is not None:
            self._confusion += self._on_device.total()
            self._on_device = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """What was counted so far, without dumped masks; :meth:`load_state_dict` goes on from it."""
        self._take_from_device()
        counts = {"confusion": self._confusion, "strange": np.array(sorted(self._strange.items())).reshape(-1, 2)}
        counts["pixels"] = np.array(self._pixels)
        return counts if self._boundary is None else {**counts, "boundary": self._boundary}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what :meth:`state_dict` gave. Raises ``ValueError`` for counts of other classes."""
        apart = ("strange", "pixels")
        own, given = ({k: v for k, v in counts.items() if k not in apart} for counts in (self.state_dict(), state))
        if {name: counts.shape for name, counts in own.items()} != {name: given[name].shape for name in given}:
            raise ValueError(f"these counts are not of the {len(self.names)} classes of {self.dataset_name!r}")
        for name, counts in own.items():
            counts[:] = given[name]
        self._strange = Counter(dict(state.get("strange", np.zeros((0, 2), int)).tolist()))
        self._pixels = int(state.get("pixels", 0))

    def evaluate(self) -> OrderedDict | None:
        """Scores as {"sem_seg": {...}}, see :func:`segmentation_scores`; None in all processes but the first."""
        self._take_from_device()
        confusion, boundary, dumped, strange = self._confusion, self._boundary, self._dumped, self._strange
        pixels = self._pixels
        if self.distributed:
            gathered = gather_when_done((confusion, boundary, dumped, strange, pixels))
            if not comm.is_main_process():
                return None
            confusions, boundaries, dumps, stranges, sizes = zip(*gathered)
            confusion = np.sum(confusions, axis=0)
            boundary = np.sum(boundaries, axis=0) if self.boundary_iou else None
            dumped = [mask for part in dumps for mask in part]
            strange, pixels = sum(stranges, Counter()), sum(sizes)
        self._warn(strange, confusion, pixels - int(confusion.sum()) - sum(strange.values()))
        scores = segmentation_scores(confusion, self.names, boundary)
        if self.output_dir:
            write_json(scores, self.output_dir / "sem_seg_scores.json")
            if self.dump_predictions:
                write_json(dumped, self.output_dir / "sem_seg_predictions.json")
        summary = ", ".join(f"{name} {scores[name]:.2f}" for name in _SUMMARY)
        logger.info("%s: %s", self.dataset_name, summary)
        return OrderedDict(sem_seg=scores)

    def _warn(self, strange: Counter[int], confusion: np.ndarray, ignored: int) -> None:
        """Once for a data set and what is found, however often it is evaluated; ``ignored`` is a count of pixels."""
        found = (self.dataset_name, tuple(sorted(strange.items())), tuple(np.any(confusion, axis=1).tolist()))
        if found in _WARNED:
            return
        _WARNED.add(found)
        if strange:
            listed = ", ".join(f"{value} in {pixels}" for value, pixels in sorted(strange.items())[:_MOST_LISTED])
            logger.warning(
                "%s: %d values in its label maps are neither a class (0..%d) nor ignored (%d), and their pixels are "
                "left out: %s%s pixels. Where the numbers begin at 1, subtract 1 from the label maps; a value that has "
                "no meaning can be the ignore_label in the metadata of the data set",
                self.dataset_name, len(strange), len(self.names) - 1, self.ignore_label,
                listed, ", ..." if len(strange) > _MOST_LISTED else "",
            )  # fmt: skip
        seen = np.flatnonzero(confusion.any(1)).tolist()
        if ignored > 0 and len(seen) < min(2, len(self.names)):
            logger.warning("%s: %s", self.dataset_name, of_one_class(seen, self.ignore_label))
        absent = [name for name, row in zip(self.names, confusion) if not row.any()]
        if absent:
            more = ", ..." if len(absent) > _MOST_LISTED else ""
            logger.warning(
                "%s: no pixel is of %d of the %d classes (%s%s): they have no IoU, and are left out of the mIoU",
                self.dataset_name, len(absent), len(self.names), ", ".join(absent[:_MOST_LISTED]), more,
            )  # fmt: skip

    def _truth(self, record: dict) -> np.ndarray:
        file = record.get("sem_seg_file_name") or self._truth_file(record.get("file_name"))
        if file is None:
            # Last, for mappers resize it with the image.
            if "sem_seg" in record:
                return np.asarray(record["sem_seg"])
            raise ValueError(f"{self.dataset_name} has no ground truth for the image {record.get('file_name')}")
        return read_labels(file)

    def _truth_file(self, image: str | None) -> str | None:
        """What the data set has for an image: mappers drop the name of the label file in testing."""
        if self._truth_files is None:
            known = self.dataset_name in DatasetCatalog
            dicts = DatasetCatalog.get(self.dataset_name) if known else []
            self._truth_files = {d["file_name"]: d["sem_seg_file_name"] for d in dicts if "sem_seg_file_name" in d}
        return None if image is None else self._truth_files.get(image)

    def _labels(self, output: dict) -> torch.Tensor:
        """(H, W) integers, on their device."""
        if "sem_seg_labels" in output:
            return output["sem_seg_labels"]
        if "sem_seg" in output:
            return output["sem_seg"].argmax(dim=0)
        raise ValueError(f'SemanticEvaluator needs "sem_seg_labels" or "sem_seg" in an output, got {sorted(output)}')

    def _encode(self, labels: np.ndarray, file_name: str) -> list[dict]:
        masks = []
        for label in np.unique(labels):
            encoded = coco_mask.encode(np.asfortranarray(labels == label))
            counts = cast("bytes", encoded["counts"])  # whatever its stubs say
            segmentation = {**encoded, "counts": counts.decode()}
            category = int(self._dataset_id.get(int(label), label))
            masks.append({"file_name": file_name, "category_id": category, "segmentation": segmentation})
        return masks
