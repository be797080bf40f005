"""Best class of every pixel, from scores that exist for a few classes at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from spar_d2.encoders.precision import full_float32


@torch.no_grad()
def best_classes(
    parts: Iterable[torch.Tensor],
    logit_scale: float = 40.0,
    prob_threshold: float = 0.0,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the class with the highest score at every pixel; ties go to the first class.

    Keeps a running maximum and, for a threshold, a running sum of exponentials: memory does not grow with the number of
    classes. Results are those of ``spar_d2.modeling.best_query``. On a GPU, the host does not wait.

    Args:
        parts: scores (C, H, W) float32 of consecutive classes, in chunks of any numbers C of classes.
        logit_scale: factor before the softmax over all classes; has no effect without a threshold.
        prob_threshold: 0..1; 0 disables it.
        allowed: (Q,) bool, classes that may be chosen, on the device of the scores. Default: all. The softmax runs over
            all classes nevertheless. Class 0 is chosen where none is allowed.

    Returns:
        best: (H, W) int64 in 0..Q - 1.
        weak: (H, W) bool, True where the probability of ``best`` is below ``prob_threshold``; empty if that is 0.

    Raises:
        ValueError: there are no classes, ``allowed`` has another number of classes, or a number is out of range.
    """
    if not 0 <= prob_threshold <= 1:
        raise ValueError(f"prob_threshold must be in 0..1, got {prob_threshold}")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be above 0, got {logit_scale}")
    running, classes = None, 0
    for scores in parts:
        if scores.ndim != 3:
            raise ValueError(f"parts must be scores (C, H, W), got {tuple(scores.shape)}")
        running = running or _Running(scores, logit_scale if prob_threshold > 0 else 0.0)
        classes += len(scores)
        if allowed is not None and classes > len(allowed):
            break
        with full_float32(scores.device):
            running.add(scores, None if allowed is None else allowed[classes - len(scores) : classes])
    if running is None or not classes:
        raise ValueError("parts must have scores of at least one class, got none")
    if allowed is not None and len(allowed) != classes:
        raise ValueError(f"allowed must have a value for each class, got {len(allowed)} for {classes} or more classes")
    with full_float32(running.best.device):
        return running.best, running.weak(prob_threshold)


class _Running:
    """Maximum, its class, and sum of exponentials over the classes so far. A logit scale of 0 leaves out the sum."""

    def __init__(self, scores: torch.Tensor, logit_scale: float) -> None:
        self.classes, self.scale = 0, logit_scale
        self.best = torch.zeros(scores.shape[1:], dtype=torch.int64, device=scores.device)
        self.top = scores.new_full(scores.shape[1:], -math.inf, dtype=torch.float32)
        # Maximum over all classes, allowed or not, to which exponentials are relative.
        self.highest, self.total = self.top.clone(), torch.zeros_like(self.top)

    def add(self, scores: torch.Tensor, allowed: torch.Tensor | None) -> None:
        """Add scores (C, H, W) of the next classes, of which some may be allowed, (C,) bool."""
        for number, plane in enumerate(scores.float()):
            candidate = plane if allowed is None else plane.where(allowed[number], -math.inf)
            self.best.masked_fill_(candidate > self.top, self.classes + number)
            torch.maximum(self.top, candidate, out=self.top)
        if self.scale and len(scores):
            highest = torch.maximum(self.highest, scores.amax(0))
            self.total.mul_(self.highest.sub_(highest).mul_(self.scale).exp_())
            for plane in scores:
                self.total.add_((plane - highest).mul_(self.scale).exp_())
            self.highest = highest
        self.classes += len(scores)

    def weak(self, prob_threshold: float) -> torch.Tensor:
        """Return (H, W) bool, where the probability of the best allowed class is below a threshold."""
        if not self.scale:
            return torch.empty(0, dtype=torch.bool, device=self.top.device)
        return (self.top - self.highest).mul_(self.scale).exp_().div_(self.total) < prob_threshold
