"""Checks labels where they are read: on a GPU, a training would have to wait to look at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode


class LabelCheck:
    """A mapper whose labels are checked.

    Args:
        cfg: says which labels there are (``MODEL.SEM_SEG_HEAD``).
        mapper: gives "sem_seg" (H, W), and "image" (3, H, W) or "features" (D, h, w).
        patch_size: pixels of a cell of the features.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict], patch_size: int = 1) -> None:
        head = cfg.MODEL.SEM_SEG_HEAD
        self._mapper, self._allowed, self._patch = mapper, (head.NUM_CLASSES, head.IGNORE_VALUE), patch_size

    def __call__(self, record: dict) -> dict:
        """What the mapper gives; raises ``ValueError`` for labels that are no class, naming their file."""
        mapped = self._mapper(record)
        # Labels of another size are the head's to complain of.
        if "sem_seg" in mapped and self._is_of_one_size(mapped):
            check_labels(mapped["sem_seg"], *self._allowed, str(record.get("sem_seg_file_name", "")))
        return mapped

    def _is_of_one_size(self, mapped: dict) -> bool:
        dense = mapped["features"] if "features" in mapped else mapped["image"]
        stride = self._patch if "features" in mapped else 1
        return tuple(-(-side // stride) for side in mapped["sem_seg"].shape) == tuple(dense.shape[1:])


def check_labels(labels: torch.Tensor, num_classes: int, ignore_value: int, of: str = "") -> None:
    """Raise ``ValueError`` where labels (H, W), on the CPU, are neither classes nor ignored; ``of`` names the file."""
    known = labels[labels != ignore_value]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < num_classes:
        raise ValueError(
            f"labels{f' of {of}' if of else ''} must be in 0..{num_classes - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"{num_classes}) or {ignore_value} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE); "
            f"got {int(known.min())}..{int(known.max())}"
        )
