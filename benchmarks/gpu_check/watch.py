"""Training hook that measures the times of a distillation step and counts synchronizations."""

from __future__ import annotations

import torch
from detectron2.engine import HookBase
from torch import nn

from benchmarks.gpu_check.clock import Clock
from benchmarks.gpu_check.waits import HostWaits
from benchmarks.measure import median_seconds
from spar_d2.distillation import DistillationHook
from spar_d2.encoders import DenseEncoder, find_encoder

WARM_UP = 3


class StepWatch(HookBase):
    """Times the teacher and the student's forward pass, and counts GPU synchronizations, after the first few steps.

    Attributes:
        steps: number of measured steps.
        windows: number of windows that the teacher encoded in them.
        frozen: seconds for the student's frozen part alone: embedding and blocks before the first trained one.
        waits: synchronizations in these steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps = self.windows = 0
        self.frozen = 0.0
        self.waits = HostWaits(device)
        self._teacher, self._student = Clock(device), Clock(device)
        self._started_steps = 0
        self._images: torch.Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def before_train(self) -> None:
        self._distillation = next(hook for hook in self.trainer._hooks if isinstance(hook, DistillationHook))
        self._encoder = find_encoder(self.trainer.model)
        self._listen(self._encoder, self._student)
        self._listen(self._distillation.teacher.encoder, self._teacher)
        self._handles.append(self._encoder.register_forward_pre_hook(self._keep))

    def before_step(self) -> None:
        self._started_steps += 1
        if self._started_steps != WARM_UP + 1:
            return
        # Measured between two steps, so that no step takes longer.
        self.frozen = self._time_frozen()
        self._first_window = self._distillation.windows_encoded
        for clock in (self._student, self._teacher):
            clock.reset()
        self.waits.__enter__()

    def after_step(self) -> None:
        if self._started_steps > WARM_UP:
            self.steps += 1
            self.windows = self._distillation.windows_encoded - self._first_window

    def after_train(self) -> None:
        if self._started_steps > WARM_UP:
            self.waits.__exit__()
        for handle in self._handles:
            handle.remove()
        self._images = None

    def seconds(self) -> tuple[float, float]:
        """Return the seconds per step of the teacher's encoder and of the student's forward pass."""
        return tuple(clock.seconds() / max(1, self.steps) for clock in (self._teacher, self._student))

    def _listen(self, module: nn.Module, clock: Clock) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda *_: clock.start()))
        self._handles.append(module.register_forward_hook(lambda *_: clock.stop()))

    def _keep(self, encoder: DenseEncoder, inputs: tuple[torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            self._images = inputs[0].detach()

    def _time_frozen(self) -> float:
        frozen = 0
        for block in self._encoder.blocks:
            if any(parameter.requires_grad for parameter in block.parameters()):
                break
            frozen += 1
        if not frozen or self._images is None:
            return 0.0

        @torch.no_grad()
        def run() -> None:
            self._encoder.intermediates(self._images, [frozen - 1])

        run()
        return median_seconds([run], 3, self.device)[0]
