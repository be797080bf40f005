"""Dataset mapper for Detectron2's PanopticFPN."""

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

# Class of all things in "sem_seg"; stuff classes start at 1.
_THINGS = 0
# Maximum number of segments in an image, plus one: segment indices have 16 bits.
_MAX_INDICES = 2**16


class PanopticMapper:
    """Reads an image and its panoptic mask, and augments both. Replaces Detectron2's ``DatasetMapper``.

    Args:
        is_train: whether to read labels.
        augmentations: Detectron2's augmentations, applied to images and masks.
        image_format: channel order of the image, "BGR" or "RGB" (``INPUT.FORMAT``).
        ignore_label: label in "sem_seg" of pixels without a segment.
        numbers: mapping from the categories of the data sets to PanopticFPN's classes; None if records are already
            mapped.
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
        """Map a dataset dict, see :func:`~spar_d2.data.datasets.panoptic.load_panoptic`.

        Returns:
            The dict without its mask entries, with "image" (3, H, W) uint8. In training, also "instances"
            (``gt_classes``, ``gt_boxes``, ``gt_masks``) of the visible things that are not crowds, and "sem_seg" (H, W)
            int64, where 0 stands for things and stuff classes start at 1.

        Raises:
            FileNotFoundError: the image or its mask does not exist.
            ValueError: the image is corrupt or its size differs from the dict; or as :func:`read_segments`.
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
            # Records of Detectron2's built-in data sets have no size.
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
        """Augment the image and the segment indices. Added pixels get 0 or 65535, which is no segment."""
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
        """Return a lookup table from segment indices to classes in "sem_seg"."""
        classes = np.full(_MAX_INDICES, self.ignore_label, dtype=np.int64)
        classes[1 : len(segments) + 1] = [
            _THINGS if segment["isthing"] else segment["category_id"] for segment in segments
        ]
        return classes


def _numbers(names: Sequence[str]) -> SeparateNumbers | None:
    """Class mapping of the data sets; None for this package's data sets, whose records are already mapped."""
    mappings = [separate_numbers(name, MetadataCatalog.get(name).as_dict()) for name in names if not is_panoptic(name)]
    if mappings and (len(mappings) < len(names) or any(mapping != mappings[0] for mapping in mappings)):
        raise ValueError(f"DATASETS.TRAIN: panoptic data sets must have the same categories, got {list(names)}")
    return mappings[0] if mappings else None


def read_segments(record: dict) -> np.ndarray:
    """Read the panoptic mask of a dataset dict, as segment ids (H, W) int32, where 0 is no segment.

    Raises:
        FileNotFoundError: the mask does not exist.
        ValueError: the mask is not an RGB image, its size differs from the dict, or it has an unlisted segment.
    """
    return _read(record)[0]


def _read(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Read the mask and convert it to segment indices (H, W) uint16: 1-based positions in ``segments_info``, or 0."""
    name = record["pan_seg_file_name"]
    ids = read_segment_ids(name)
    if ids.shape != (record["height"], record["width"]):
        size, expected = (f"{width}x{height}" for height, width in (ids.shape, (record["height"], record["width"])))
        raise ValueError(f"the panoptic mask {name} has {size} pixels, its image {record['file_name']} has {expected}")
    first, lengths = runs(ids)
    numbers, unknown = places(ids.ravel()[first], [segment["id"] for segment in record["segments_info"]])
    if len(unknown):
        raise ValueError(f"the panoptic mask {name} has the segment {unknown[0]}, which its data set does not list")
    return ids, np.repeat(numbers.astype(np.uint16), lengths).reshape(ids.shape)


def _instances(segments: list[dict], owners: np.ndarray) -> Instances:
    """Create the instances of the visible things that are not crowds."""
    bounds = boxes(owners, len(segments))
    things = [
        index
        for index, segment in enumerate(segments, start=1)
        if segment["isthing"] and not segment["iscrowd"] and bounds[index, 2] > 0
    ]
    masks = np.zeros((len(things), *owners.shape), dtype=bool)
    # Restricted to the bounding box: comparing all pixels with each thing would dominate the run time.
    for mask, index, (x0, y0, x1, y1) in zip(masks, things, bounds[things].tolist()):
        mask[y0:y1, x0:x1] = owners[y0:y1, x0:x1] == index
    instances = Instances(owners.shape)
    instances.gt_classes = torch.tensor([segments[index - 1]["category_id"] for index in things], dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    instances.gt_boxes = Boxes(torch.from_numpy(bounds[things].astype(np.float32)))
    return instances
