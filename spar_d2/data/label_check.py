"""Checks labels in the data loader, because checking them on a GPU would require a synchronization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode


class LabelCheck:
    """Wraps a dataset mapper and checks its labels.

    Args:
        cfg: config whose ``MODEL.SEM_SEG_HEAD`` defines the valid labels.
        mapper: mapper that returns "sem_seg" (H, W), and "image" (3, H, W) or "features" (D, h, w).
        patch_size: patch size of the features in pixels.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict], patch_size: int = 1) -> None:
        head = cfg.MODEL.SEM_SEG_HEAD
        self._mapper, self._allowed, self._patch = mapper, (head.NUM_CLASSES, head.IGNORE_VALUE), patch_size

    def __call__(self, record: dict) -> dict:
        """Apply the mapper. Raises ``ValueError`` with the file name if labels are out of range or of another size."""
        mapped = self._mapper(record)
        if "sem_seg" not in mapped:
            return mapped
        file = str(record.get("sem_seg_file_name", ""))
        if self._is_of_one_size(mapped):
            check_labels(mapped["sem_seg"], *self._allowed, file)
        elif file:  # otherwise, the head reports it
            sizes = "x".join(map(str, self._patches(mapped))), "x".join(map(str, self._grid(mapped)))
            shape = "x".join(map(str, mapped["sem_seg"].shape))
            raise ValueError(
                f"label map {file}: labels of {shape} pixels have {sizes[0]} patches of {self._stride(mapped)} pixels, "
                f"but their image has {sizes[1]}: an image and its labels must have the same size"
            )
        return mapped

    def _is_of_one_size(self, mapped: dict) -> bool:
        return self._patches(mapped) == self._grid(mapped)

    def _stride(self, mapped: dict) -> int:
        return self._patch if "features" in mapped else 1

    def _patches(self, mapped: dict) -> tuple[int, ...]:
        return tuple(-(-side // self._stride(mapped)) for side in mapped["sem_seg"].shape)

    @staticmethod
    def _grid(mapped: dict) -> tuple[int, ...]:
        return tuple((mapped["features"] if "features" in mapped else mapped["image"]).shape[1:])


def check_labels(labels: torch.Tensor, num_classes: int, ignore_value: int, of: str = "") -> None:
    """Raise ``ValueError`` if labels (H, W) on the CPU are neither classes nor ignored. ``of`` is the file name."""
    valid = labels[labels != ignore_value]
    if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < num_classes:
        raise ValueError(
            f"labels{f' of {of}' if of else ''} must be in 0..{num_classes - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"{num_classes}) or {ignore_value} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE); "
            f"got {int(valid.min())}..{int(valid.max())}"
        )
