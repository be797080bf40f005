"""One training step: forward, backward and update, in parts where memory is short."""

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
    """Detectron2's training step with gradient accumulation and mixed precision, on a GPU or a CPU.

    On a GPU it waits once a step, to see that losses and gradients are finite; losses are written many steps at once.

    Args:
        model: in training it returns a dict of losses.
        data_loader: gives lists of inputs.
        optimizer: over the model's parameters.
        parts: each list is taken in this many parts, one after another; losses and gradients are those of the whole
            list, for losses that are means over inputs.
        precision: of autocast over the whole model; None for none.
        scale: scale gradients, which float16 needs.
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
        """Take one step.

        Raises:
            FloatingPointError: a loss or gradient that is NaN or infinite; the weights are as they were.
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
            with self._gradients_stay_here(start != starts[-1]):
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
        """Write the losses of the last steps of a training that was stopped."""
        # One of several processes may have failed, and then nobody answers.
        if comm.get_world_size() == 1:
            self._write_readings()

    def _write_readings(self) -> None:
        """Losses as Detectron2 writes them, means over processes; of data times the longest."""
        storage = get_event_storage()
        own = self.readings.take()
        for iteration, numbers in own:
            storage.put_scalar("rank_data_time", numbers["data_time"], cur_iter=iteration)
        for steps in zip(*comm.gather(own)):
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
                f"{type(self.model).__name__} must return a loss or a dict of losses in training, it returned {got}"
            )
        losses = {name: loss * share for name, loss in losses.items()}
        self.scaler.scale(functools.reduce(torch.add, losses.values())).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _gradients_stay_here(self, stay: bool) -> contextlib.AbstractContextManager:
        """Processes exchange their gradients once a step, after its last part."""
        parallel = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return self.model.no_sync() if parallel and stay else contextlib.nullcontext()

    def _check_finite(self, losses: dict[str, torch.Tensor], data: list[dict]) -> None:
        numbers = list(losses.values())
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not self.scaler.is_enabled():  # a scaler leaves out such steps and lowers its factor
            norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
            numbers.append(torch.stack(norms).norm())
        # All at once, so that a GPU is waited for once.
        finite = torch.stack([number.float() for number in numbers]).isfinite()
        if finite.all():
            return
        bad = [name for name, is_finite in zip(losses, finite.tolist()) if not is_finite]
        what = f"{', '.join(bad)} of the losses" if bad else "the gradient"
        raise FloatingPointError(
            f"{what} is NaN or infinite at iteration {self.iter}, for {', '.join(map(name_of, data))}; the weights are "
            "as they were. A lower SOLVER.BASE_LR or SOLVER.CLIP_GRADIENTS may help"
        )

    def state_dict(self) -> dict:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
