"""Exponential moving average (EMA) of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ModelEma(HookBase):
    """Maintains an exponential moving average of the trainable parameters, which is saved in checkpoints.

    Args:
        model: model whose trainable parameters are averaged, in float32.
        decay: decay of the average per step, between 0 and 1.

    Raises:
        ValueError: ``decay`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"SPAR.EMA_DECAY must be 0 (no EMA) or between 0 and 1, got {decay}")
        self.decay = decay
        # torch.optim.swa_utils.AveragedModel would copy the whole model, including its frozen weights.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages: dict[str, torch.Tensor] = {}

    def before_train(self) -> None:
        if not self._averages:
            self._averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    def after_step(self) -> None:
        new = [self._parameters[name].detach().float() for name in self._averages]
        get_ema_multi_avg_fn(self.decay)(list(self._averages.values()), new, 0)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the model has the averaged weights."""
        original = {name: self._parameters[name].detach().clone() for name in self._averages}
        self._set(self._averages)
        try:
            yield
        finally:
            self._set(original)

    @torch.no_grad()
    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def state_dict(self) -> dict:
        return {"averages": self._averages}

    def load_state_dict(self, state: dict) -> None:
        self._averages = {name: value.to(self._parameters[name].device) for name, value in state["averages"].items()}
