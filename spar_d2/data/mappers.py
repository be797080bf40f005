"""From panoptic masks to what Detectron2's PanopticFPN trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances

from spar_d2.data.datasets.panoptic import is_panoptic, read_segment_ids
from spar_d2.data.datasets.scenes import IGNORE_LABEL
from spar_d2.data.semantic_mapper import joined
from spar_d2.utils.id_maps import boxes, places, runs
from spar_d2.utils.images import check_image_file
from spar_d2.utils.panoptic_numbers import SeparateNumbers, separate_numbers

# Class of things in "sem_seg", where stuff counts from 1 on.
_THINGS = 0
# Of segments in an image: as many as 16 bits tell apart.
_PLACES = 2**16


class PanopticMapper:
    """Reads an image and its panoptic mask, and augments both alike; stands where Detectron2's ``DatasetMapper`` does.

    Args:
        is_train: in testing only the image is read.
        augmentations: Detectron2's, for images and masks.
        image_format: order of the image's channels, "BGR" or "RGB" (``INPUT.FORMAT``).
        ignore_label: in "sem_seg", for pixels that belong to no segment.
        numbers: PanopticFPN's numbers for the classes of the data sets; None where records have them already.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "BGR",
        ignore_label: int = IGNORE_LABEL,
        numbers: SeparateNumbers | None = None,
    ) -> None:
        self.is_train = is_train
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.ignore_label = ignore_label
        self.numbers = numbers

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        augmentations = detection_utils.build_augmentation(cfg, is_train)
        if cfg.INPUT.CROP.ENABLED and is_train:
            augmentations = [T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE), *augmentations]
        numbers = _numbers(cfg.DATASETS.TRAIN) if is_train else None
        form = {"image_format": cfg.INPUT.FORMAT, "numbers": numbers}
        return {"is_train": is_train, "augmentations": augmentations, **form}

    def __call__(self, record: dict) -> dict:
        """A dataset dict, see :func:`~spar_d2.data.datasets.panoptic.load_panoptic`, with what it names.

        Returns:
            The dict's other entries, with "image" (3, H, W) uint8 and, in training, "instances" of the things that are
            still seen and are no crowds (``gt_classes``, ``gt_boxes``, ``gt_masks``), and "sem_seg" (H, W) int64: stuff
            from 1 on, 0 for things.

        Raises:
            FileNotFoundError: the image or its mask is not there.
            ValueError: the image is damaged, or has not the size that the dict says, or see :func:`read_segments`.
        """
        result = {key: value for key, value in record.items() if key not in ("pan_seg_file_name", "segments_info")}
        check_image_file(record["file_name"])
        try:
            image = detection_utils.read_image(record["file_name"], format=self.image_format)
        except OSError as error:
            raise ValueError(f"the image {record['file_name']} cannot be read: {error}") from error
        detection_utils.check_image_size(result, image)
        if self.is_train:
            segments = [self._renumbered(segment) for segment in record["segments_info"]]
            # Records of Detectron2's own data sets have no size.
            size = {"height": result["height"], "width": result["width"]}
            image, owners = self._augment(image, _read({**record, **size})[1], len(segments))
            result["instances"] = _instances(segments, owners)
            result["sem_seg"] = torch.from_numpy(self._stuff(segments)[owners])
        else:
            augmented = T.AugInput(image)
            self.augmentations(augmented)
            image = augmented.image
        assert image is not None
        result["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return result

    def _augment(self, image: np.ndarray, owners: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and places of segments; those that augmentations fill in, 0 or all bits set, are none's."""
        augmented = T.AugInput(image, sem_seg=owners.astype(np.uint8))
        transforms = self.augmentations(augmented)
        low = augmented.sem_seg
        assert augmented.image is not None and low is not None
        return augmented.image, low if largest < 255 else joined(transforms, owners, low)

    def _renumbered(self, segment: dict) -> dict:
        if self.numbers is None:
            return segment
        numbers = self.numbers.things if segment["isthing"] else self.numbers.stuff
        crowd = segment.get("iscrowd", 0)
        return {**segment, "category_id": numbers[segment["category_id"]], "iscrowd": crowd}

    def _stuff(self, segments: list[dict]) -> np.ndarray:
        """Class in "sem_seg" of the segment at every place."""
        classes = np.full(_PLACES, self.ignore_label, dtype=np.int64)
        classes[1 : len(segments) + 1] = [_THINGS if one["isthing"] else one["category_id"] for one in segments]
        return classes


def _numbers(names: Sequence[str]) -> SeparateNumbers | None:
    """Those of all data sets; None where they are ours, whose records have them."""
    found = [separate_numbers(name, MetadataCatalog.get(name).as_dict()) for name in names if not is_panoptic(name)]
    if found and (len(found) < len(names) or any(one != found[0] for one in found)):
        raise ValueError(f"DATASETS.TRAIN: panoptic data sets must have the same numbers of classes, got {list(names)}")
    return found[0] if found else None


def read_segments(record: dict) -> np.ndarray:
    """The panoptic mask of a dataset dict: (H, W) int32 ids of segments, 0 for none.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no RGB picture, has not the size that the dict says, or a segment that the dict has not.
    """
    return _read(record)[0]


def _read(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """The mask, and as (H, W) uint16 the place of every pixel's segment in the dict's list, from 1 on; 0 is none."""
    name = record["pan_seg_file_name"]
    ids = read_segment_ids(name)
    if ids.shape != (record["height"], record["width"]):
        size, expected = (f"{width}x{height}" for height, width in (ids.shape, (record["height"], record["width"])))
        raise ValueError(f"the panoptic mask {name} is {size} pixels, its image {record['file_name']} {expected}")
    first, lengths = runs(ids)
    numbers, strange = places(ids.ravel()[first], [segment["id"] for segment in record["segments_info"]])
    if len(strange):
        raise ValueError(f"the panoptic mask {name} has the segment {strange[0]}, which its data set does not list")
    return ids, np.repeat(numbers.astype(np.uint16), lengths).reshape(ids.shape)


def _instances(segments: list[dict], owners: np.ndarray) -> Instances:
    """Of the things that are seen and are no crowds."""
    around = boxes(owners, len(segments))
    things = [
        place
        for place, segment in enumerate(segments, start=1)
        if segment["isthing"] and not segment["iscrowd"] and around[place, 2] > 0
    ]
    masks = np.zeros((len(things), *owners.shape), dtype=bool)
    # Comparing all pixels with each thing would take longer than all else.
    for mask, place, (x0, y0, x1, y1) in zip(masks, things, around[things].tolist()):
        mask[y0:y1, x0:x1] = owners[y0:y1, x0:x1] == place
    instances = Instances(owners.shape)
    instances.gt_classes = torch.tensor([segments[place - 1]["category_id"] for place in things], dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    instances.gt_boxes = Boxes(torch.from_numpy(around[things].astype(np.float32)))
    return instances
