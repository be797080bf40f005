"""Detectron2 evaluator for panoptic segmentation."""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from spar_d2.evaluation.panoptic.coco_json import GroundTruth, read_ground_truth
from spar_d2.evaluation.panoptic.coco_png import check_complete, compare_image, write_ids
from spar_d2.evaluation.panoptic.outputs import OutputForm
from spar_d2.evaluation.panoptic.scores import PanopticCounts, score_table
from spar_d2.utils.io import write_json
from spar_d2.utils.panoptic_numbers import STUFF, THINGS, separate_numbers
from spar_d2.utils.processes import gather_when_done

logger = logging.getLogger(__name__)

_GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}
_SCORES = ("pq", "sq", "rq")
_KEYS = ("panoptic_json", "panoptic_root")
_DUMP = "panoptic_seg_predictions"


class PanopticEvaluator(DatasetEvaluator):
    """Computes panoptic quality by COCO's rules.

    Supports both formats of Detectron2's "panoptic_seg": ids with a list of segments, where 0 is void; and labels
    category * label_divisor + instance without a list, where -1 is void. Each image is compared with its ground truth
    immediately, and only counts are stored. Duplicate images are counted once.

    Args:
        dataset_name: name of a registered data set; its metadata must have "panoptic_json", "panoptic_root" and, to map
            contiguous categories to the data set's, "thing_dataset_id_to_contiguous_id" and
            "stuff_dataset_id_to_contiguous_id". If they are missing when the first image is processed, the data set is
            loaded, which may set them.
        output_dir: if given, scores of all categories are written there ("panoptic_seg_scores.json") and, with
            ``dump_predictions``, predictions in COCO's format ("panoptic_seg_predictions.json" and a folder of PNGs).
        distributed: combine the counts of all processes; only the main process returns scores.
        dump_predictions: see ``output_dir``.
        separate: predictions use PanopticFPN's classes, where things start at 0 and stuff starts at 1, instead of the
            contiguous categories of the data set.

    Raises:
        ValueError: ``dump_predictions`` is set without an ``output_dir``.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | os.PathLike | None = None,
        distributed: bool = True,
        dump_predictions: bool = False,
        separate: bool = False,
    ) -> None:
        if dump_predictions and not output_dir:
            raise ValueError("dump_predictions needs an output_dir to write to")
        self.dataset_name = dataset_name
        self.output_dir = Path(output_dir) if output_dir else None
        self.distributed = distributed
        self.dump_predictions = dump_predictions
        self.separate = separate
        self._dataset: tuple[GroundTruth, OutputForm] | None = None
        self.reset()

    def reset(self) -> None:
        # For each image: rows of (category index, row of PanopticCounts.values).
        self._counted: dict[int | str, np.ndarray] = {}
        self._dumped: dict[int | str, dict] = {}
        self._unknown: set[int | str] = set()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Process a batch. Images that are not in the ground truth are ignored.

        Raises:
            ValueError: an input has no "image_id" or an output no "panoptic_seg", the segments do not match the map, a
                category is unknown, sizes differ, or the ground truth is missing or corrupt.
        """
        truth, form = self._load()
        for record, output in zip(inputs, outputs):
            for values, key in ((record, "image_id"), (output, "panoptic_seg")):
                if key not in values:
                    raise ValueError(f'PanopticEvaluator needs "{key}", got {sorted(values)}')
            image_id = truth.find(record["image_id"])
            if image_id is None:
                self._unknown.add(record["image_id"])
                continue
            panoptic, segments = output["panoptic_seg"]
            ids, categories = form.read(panoptic, segments, f"the prediction for the image {image_id}")
            self._count(truth, image_id, ids, categories)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the counts so far, without dumped predictions, for :meth:`load_state_dict`."""
        truth = self._load()[0]
        indices = {image_id: index for index, image_id in enumerate(truth.images)}
        rows = list(self._counted.values())
        return {
            "categories": np.array(list(truth.names), dtype=np.int64),
            "images": np.array([indices[image_id] for image_id in self._counted], dtype=np.int64),
            "sizes": np.array([len(part) for part in rows], dtype=np.int64),
            "rows": np.concatenate([np.zeros((0, 5)), *rows]),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore counts of :meth:`state_dict`. Raises ``ValueError`` if they belong to other categories or images."""
        truth = self._load()[0]
        ids, images, sizes = list(truth.images), state["images"], state["sizes"]
        if (
            not np.array_equal(state["categories"], list(truth.names))
            or (images.size and images.max() >= len(ids))
            or (len(images), sizes.sum()) != (len(sizes), len(state["rows"]))
        ):
            raise ValueError(f"these counts do not match the categories and images of {self.dataset_name!r}")
        rows = np.split(state["rows"], np.cumsum(sizes)[:-1]) if len(sizes) else []
        self._counted = {ids[index]: part for index, part in zip(images.tolist(), rows)}

    def evaluate(self) -> OrderedDict | None:
        """Compute scores in percent, as {"panoptic_seg": {...}}; None in all processes but the main one.

        Returns:
            "PQ", "SQ" and "RQ", with the suffix "_th" for things and "_st" for stuff, as Detectron2's evaluator; and
            "PQ-name" for every category, followed by its id if several categories share the name. It is 0 if the
            category is neither in the ground truth nor in the predictions.

        Raises:
            ValueError: images of the ground truth have not been processed.
        """
        counted, dumped, unknown = self._counted, self._dumped, self._unknown
        if self.distributed:
            gathered = gather_when_done((counted, dumped, unknown))
            if not comm.is_main_process():
                return None
            counted, dumped, unknown = {}, {}, set()
            for part in gathered:
                # Distributed samplers may give an image to several processes, to balance them.
                counted, dumped, unknown = part[0] | counted, part[1] | dumped, part[2] | unknown
        truth = self._load()[0]
        hint = f"; {len(unknown)} images are not in it, such as {min(unknown, key=str)!r}" if unknown else ""
        check_complete(truth, counted, hint)
        scores = _total(truth, counted.values()).scores(truth.things)
        if self.output_dir:
            write_json(scores, self.output_dir / "panoptic_seg_scores.json")
            if self.dump_predictions:
                annotations = [dumped[image_id] for image_id in truth.images if image_id in dumped]
                write_json({"annotations": annotations}, self.output_dir / f"{_DUMP}.json")
        logger.info("%s:\n%s", self.dataset_name, score_table(scores))
        result = {
            f"{score.upper()}{suffix}": 100 * scores[group][score]
            for group, suffix in _GROUPS.items()
            for score in _SCORES
        }
        uses = Counter(truth.names.values())
        for number, name in truth.names.items():
            key = name if uses[name] == 1 else f"{name} ({number})"
            result[f"PQ-{key}"] = 100 * scores["per_class"][number]["pq"]
        return OrderedDict(panoptic_seg=result)

    def _load(self) -> tuple[GroundTruth, OutputForm]:
        if self._dataset is None:
            self._dataset = _load_dataset(self.dataset_name, self.separate)
        return self._dataset

    def _count(self, truth: GroundTruth, image_id: int | str, ids: np.ndarray, categories: dict[int, int]) -> None:
        values = compare_image(truth, image_id, ids, categories).values
        if self.dump_predictions:
            self._dumped[image_id] = self._dump(truth, image_id, ids, categories)
        indices = np.flatnonzero(values.any(axis=1))
        self._counted[image_id] = np.column_stack([indices, values[indices]])

    def _dump(self, truth: GroundTruth, image_id: int | str, ids: np.ndarray, categories: dict[int, int]) -> dict:
        file_name = truth.images[image_id].file_name
        assert self.output_dir is not None  # no dump without one
        write_ids(ids, self.output_dir / _DUMP / file_name)
        segments = [{"id": number, "category_id": category} for number, category in categories.items()]
        return {"image_id": image_id, "file_name": file_name, "segments_info": segments}


def _load_dataset(name: str, separate: bool) -> tuple[GroundTruth, OutputForm]:
    if not _is_there(name) and name in DatasetCatalog:
        DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    missing = [key for key in _KEYS if not metadata.get(key)]
    if missing or not (metadata.get(THINGS) or metadata.get(STUFF)):
        missing = missing or [f"{THINGS} or {STUFF}"]
        raise ValueError(f"the data set {name!r} has no {' and no '.join(missing)} in its metadata")
    truth = read_ground_truth(*(PathManager.get_local_path(str(metadata.get(key))) for key in _KEYS))
    if separate:
        numbers = separate_numbers(name, metadata.as_dict())
        return truth, OutputForm(numbers.own_things, numbers.own_stuff)
    things, stuff = ({ours: theirs for theirs, ours in (metadata.get(key) or {}).items()} for key in (THINGS, STUFF))
    return truth, OutputForm(things, stuff, metadata.get("label_divisor"))


def _is_there(name: str) -> bool:
    metadata = MetadataCatalog.get(name)
    return all(metadata.get(key) for key in (*_KEYS, THINGS, STUFF)) and PathManager.isfile(metadata.panoptic_json)


def _total(truth: GroundTruth, counted: Iterable[np.ndarray]) -> PanopticCounts:
    total = PanopticCounts.zeros(truth.names)
    rows = np.concatenate([np.zeros((0, 5)), *counted])
    np.add.at(total.values, rows[:, 0].astype(np.int64), rows[:, 1:])
    return total
