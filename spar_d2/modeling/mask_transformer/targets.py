"""Training targets: masks and classes of the segments of an image."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks

from spar_d2.utils.transfer import send

# Class of all things in "sem_seg" of panoptic inputs; stuff classes start at 1.
_THINGS = 0


@dataclass(frozen=True)
class Targets:
    """Segments of an image.

    Attributes:
        classes: (G,) int64 class of each segment: things first, then stuff.
        masks: (G, H, W) bool.
        valid: (H, W) bool, False for pixels without a label, at which nothing is learned.
    """

    classes: torch.Tensor
    masks: torch.Tensor
    valid: torch.Tensor

    def to(self, device: torch.device) -> Targets:
        """Return a copy on a device."""
        parts = (self.classes, self.masks, self.valid)
        return Targets(*(send(part, device) for part in parts))


def panoptic_targets(inputs: dict, things: int, ignore_label: int, excluded: Collection[int] = ()) -> Targets:
    """Convert labels of :class:`~spar_d2.data.mappers.PanopticMapper`, or of Detectron2's ``DatasetMapper``.

    Each thing and each stuff class is a segment.

    Args:
        inputs: dict with "instances" (``gt_classes``, ``gt_masks``) and "sem_seg" (H, W), where 0 stands for things.
        things: number of thing classes T; stuff class s has the number T + s - 1.
        ignore_label: label of pixels without a segment.
        excluded: classes that are treated as unlabeled.

    Raises:
        ValueError: labels are missing.
    """
    missing = [key for key in ("instances", "sem_seg") if key not in inputs]
    if missing:
        raise ValueError(
            f"MaskTransformer needs panoptic labels in training: the inputs have no {' and no '.join(missing)}"
        )
    instances, labels = inputs["instances"], inputs["sem_seg"]
    classes, masks = instances.gt_classes, _masks(instances, labels)
    valid = (labels != ignore_label) & ((labels != _THINGS) | masks.any(0))
    stuff = [label for label in labels.unique().tolist() if label not in (_THINGS, ignore_label)]
    classes = torch.cat([classes, torch.tensor([things + label - 1 for label in stuff], dtype=torch.int64)])
    masks = torch.cat([masks, *((labels == label)[None] for label in stuff)])
    return _without(Targets(classes, masks, valid), excluded)


def semantic_targets(inputs: dict, ignore_label: int, excluded: Collection[int] = ()) -> Targets:
    """Convert a label map: each class is a segment.

    Args:
        inputs: dict with "sem_seg" (H, W).
        ignore_label: label of pixels without a class.
        excluded: classes that are treated as unlabeled.

    Raises:
        ValueError: labels are missing.
    """
    if "sem_seg" not in inputs:
        raise ValueError("MaskTransformer needs labels in training: the inputs have no sem_seg")
    labels = inputs["sem_seg"]
    classes = [label for label in labels.unique().tolist() if label != ignore_label]
    masks = (
        torch.stack([labels == label for label in classes]) if classes else labels.new_zeros(0, *labels.shape).bool()
    )
    return _without(Targets(torch.tensor(classes, dtype=torch.int64), masks, labels != ignore_label), excluded)


def _masks(instances: Instances, labels: torch.Tensor) -> torch.Tensor:
    """Return the masks (n, H, W) bool of instances, which Detectron2 omits if there are none."""
    if not instances.has("gt_masks"):
        return labels.new_zeros(0, *labels.shape, dtype=torch.bool)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *labels.shape)
    return masks.tensor


def _without(targets: Targets, excluded: Collection[int]) -> Targets:
    if not excluded:
        return targets
    kept = torch.tensor([number not in excluded for number in targets.classes.tolist()], dtype=torch.bool)
    hidden = targets.masks[~kept].any(0)
    return Targets(targets.classes[kept], targets.masks[kept], targets.valid & ~hidden)
