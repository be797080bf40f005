"""Training step with gradient accumulation and mixed precision."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterable

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from spar_d2.distillation.match_inputs import name_of
from spar_d2.distillation.readings import Readings


class TrainStep(SimpleTrainer):
    """``SimpleTrainer`` with gradient accumulation and mixed precision, on GPUs and CPUs.

    On a GPU, the step synchronizes once, to check that losses and gradients are finite. Losses of several steps are
    written together.

    Args:
        model: model that returns a dict of losses in training.
        data_loader: data loader that yields lists of inputs.
        optimizer: optimizer of the model.
        parts: number of accumulation steps: each list is split into this many parts. For losses that are means over
            inputs, the result equals that of the full list.
        precision: autocast dtype of the whole model; None disables autocast.
        scale: whether to scale gradients, as required for float16.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        parts: int = 1,
        precision: torch.dtype | None = None,
        scale: bool = False,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.parts, self.precision = parts, precision
        self.readings = Readings()
        self.max_iter = 0  # until training starts
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scale)

    def run_step(self) -> None:
        """Run one training step.

        Raises:
            FloatingPointError: a loss or gradient is NaN or infinite; the weights are unchanged.
            RuntimeError: the model returned no loss.
        """
        started = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - started
        self.optimizer.zero_grad()
        size = math.ceil(len(data) / self.parts)
        starts = range(0, len(data), size)
        losses: dict[str, torch.Tensor] = {}
        for start in starts:
            part = data[start : start + size]
            with self._no_sync(start != starts[-1]):
                for name, loss in self._backward(part, len(part) / len(data)).items():
                    losses[name] = losses[name] + loss if name in losses else loss
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        self._check_finite(losses, data)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.readings.add(self.iter, {"data_time": data_time}, losses)
        if self.readings.are_due(self.iter, self.max_iter):
            self._write_readings()

    def after_train(self) -> None:
        self.write_last_readings()
        super().after_train()

    def write_last_readings(self) -> None:
        """Write the losses of the last steps when training stops."""
        # With several processes, one may have failed, and a collective operation would hang.
        if comm.get_world_size() == 1:
            self._write_readings()

    def _write_readings(self) -> None:
        """Write the mean losses and the maximum data time of all processes, as Detectron2 does."""
        storage = get_event_storage()
        readings = self.readings.take()
        for iteration, numbers in readings:
            storage.put_scalar("rank_data_time", numbers["data_time"], cur_iter=iteration)
        for steps in zip(*comm.gather(readings)):
            iteration = steps[0][0]
            data_time = max(numbers.pop("data_time") for _, numbers in steps)
            means = {name: float(np.mean([numbers[name] for _, numbers in steps])) for name in steps[0][1]}
            storage.put_scalar("data_time", data_time, cur_iter=iteration)
            storage.put_scalar("total_loss", sum(means.values()), cur_iter=iteration)
            if len(means) > 1:
                storage.put_scalars(cur_iter=iteration, **means)

    def _backward(self, part: list[dict], share: float) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            losses = self.model(part)
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}
        if not isinstance(losses, dict) or not losses:
            got = "an empty dict" if isinstance(losses, dict) else type(losses).__name__
            raise RuntimeError(
                f"{type(self.model).__name__} must return a loss or a dict of losses in training, but returned {got}"
            )
        losses = {name: loss * share for name, loss in losses.items()}
        self.scaler.scale(functools.reduce(torch.add, losses.values())).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _no_sync(self, skip: bool) -> contextlib.AbstractContextManager:
        """Return a context manager that, if ``skip`` is set, skips the gradient synchronization between processes."""
        parallel = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.no_sync() if parallel and skip else contextlib.nullcontext()

    def _check_finite(self, losses: dict[str, torch.Tensor], data: list[dict]) -> None:
        numbers = list(losses.values())
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not self.scaler.is_enabled():  # the scaler skips such steps and reduces its scale
            norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
            numbers.append(torch.stack(norms).norm())
        # Check all values together, to synchronize with the GPU only once.
        finite = torch.stack([number.float() for number in numbers]).isfinite()
        if finite.all():
            return
        bad = [name for name, is_finite in zip(losses, finite.tolist()) if not is_finite]
        what = f"{', '.join(bad)} of the losses" if bad else "the gradient"
        raise FloatingPointError(
            f"{what} is NaN or infinite at iteration {self.iter}, for {', '.join(map(name_of, data))}; the weights are "
            "unchanged. Reduce SOLVER.BASE_LR or enable SOLVER.CLIP_GRADIENTS"
        )

    def state_dict(self) -> dict:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
