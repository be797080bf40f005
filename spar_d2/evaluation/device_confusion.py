"""Confusion matrices on a device, without synchronization. Plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from spar_d2.utils.transfer import send


class DeviceConfusion:
    """Accumulates confusion matrices on a device. Only their sum is copied to the host.

    Args:
        classes: number of classes C.
        ignore_label: ground truth label that is ignored.
        device: device of the predictions.
    """

    def __init__(self, classes: int, ignore_label: int, device: torch.device) -> None:
        self.classes, self.ignore_label, self.device = classes, ignore_label, device
        # Values that are not a class become class C, whose row is dropped.
        self._counts = torch.zeros((classes + 1) ** 2, dtype=torch.int64, device=device)

    def add(self, prediction: torch.Tensor, truth: np.ndarray) -> None:
        """Add an image.

        Args:
            prediction: (H, W) integers, on the device; values outside 0..C-1 count as wrong.
            truth: (H, W) integers; pixels with ``ignore_label`` or values outside 0..C-1 are ignored.
        """
        # PyTorch barely supports unsigned integers of more than 8 bits. astype also makes a writable copy, as it
        # expects.
        labels = torch.from_numpy(truth.astype(np.uint8 if truth.dtype == np.uint8 else np.int64))
        labels = send(labels, self.device).long()
        rows = self._numbered(labels, labels != self.ignore_label)
        pairs = rows * (self.classes + 1) + self._numbered(prediction.long())
        # bincount would synchronize to find the largest value.
        self._counts.scatter_add_(0, pairs.flatten(), self._counts.new_ones(1).expand(pairs.numel()))

    def _numbered(self, labels: torch.Tensor, counted: torch.Tensor | bool = True) -> torch.Tensor:
        return torch.where((labels >= 0) & (labels < self.classes) & counted, labels, self.classes)

    def total(self) -> np.ndarray:
        """Return the sum (C, C + 1) int64, see :func:`spar_d2.evaluation.confusion_matrix.confusion_matrix`."""
        return self._counts.view(self.classes + 1, -1)[: self.classes].cpu().numpy()
