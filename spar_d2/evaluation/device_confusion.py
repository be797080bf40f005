"""Counting of label maps on the device where they are, without waiting for it. Plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from spar_d2.utils.transfer import send


class DeviceConfusion:
    """Adds up confusion matrices on a device; only their sum is ever copied from it.

    Args:
        classes: number of classes C.
        ignore_label: truth that is left out.
        device: of the predictions.
    """

    def __init__(self, classes: int, ignore_label: int, device: torch.device) -> None:
        self.classes, self.ignore_label, self.device = classes, ignore_label, device
        # What is no class is class C, whose row is left out.
        self._counts = torch.zeros((classes + 1) ** 2, dtype=torch.int64, device=device)

    def add(self, prediction: torch.Tensor, truth: np.ndarray) -> None:
        """Count an image.

        Args:
            prediction: (H, W) integers, on the device; values outside 0..C-1 count as wrong.
            truth: (H, W) integers; pixels of ``ignore_label`` or outside 0..C-1 are left out.
        """
        # PyTorch has few operations for unsigned numbers of more than 8 bits; the copy is writable, as it wants.
        known = torch.from_numpy(truth.astype(np.uint8 if truth.dtype == np.uint8 else np.int64))
        known = send(known, self.device).long()
        rows = self._numbered(known, known != self.ignore_label)
        pairs = rows * (self.classes + 1) + self._numbered(prediction.long())
        # Not by bincount, which waits for the largest number.
        self._counts.scatter_add_(0, pairs.flatten(), self._counts.new_ones(1).expand(pairs.numel()))

    def _numbered(self, labels: torch.Tensor, counted: torch.Tensor | bool = True) -> torch.Tensor:
        return torch.where((labels >= 0) & (labels < self.classes) & counted, labels, self.classes)

    def total(self) -> np.ndarray:
        """(C, C + 1) int64 as :func:`spar_d2.evaluation.confusion_matrix.confusion_matrix`, over all images."""
        return self._counts.view(self.classes + 1, -1)[: self.classes].cpu().numpy()
