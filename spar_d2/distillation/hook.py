"""The trainer hook that adds distillation to any Detectron2 training."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from spar_d2.distillation.loss import distillation_loss, sampled_distillation_loss
from spar_d2.encoders import DenseEncoder, find_encoder
from spar_d2.modeling.build import encoder_from_config
from spar_d2.teacher import SlidingWindowTeacher

LOSS_NAME = "loss_distill"


class DistillationHook(HookBase):
    """Adds ``loss_distill`` to the loss dict of a model that holds a dense encoder.

    The hook listens to the encoder, wherever in the model it is: whatever images it encodes in a training step, the
    teacher encodes too. It works with any trainer of Detectron2's that calls ``model(data)`` and sums a loss dict, and
    takes itself off the model after training.

    ``DistillationHook(cfg)`` builds the teacher from ``MODEL.SPAR`` and ``SPAR.TEACHER``.

    Args:
        teacher: gives the targets.
        weight: factor on the loss.
        windows_per_image: windows that the teacher encodes for each image, drawn at random; 0 for all.
        seed: of the random windows; a run that is resumed draws on as if it had not stopped.

    Raises:
        ValueError: a negative ``weight`` or ``windows_per_image``.
    """

    @configurable
    def __init__(
        self, teacher: SlidingWindowTeacher, weight: float = 1.0, windows_per_image: int = 0, seed: int = 0
    ) -> None:
        if weight < 0:
            raise ValueError(f"weight (SPAR.DISTILL.WEIGHT) must not be negative, got {weight}")
        if windows_per_image < 0:
            raise ValueError(
                f"windows_per_image (SPAR.TEACHER.WINDOWS_PER_IMAGE) must be 0 (all) or more, got {windows_per_image}"
            )
        self.teacher = teacher
        self.weight = weight
        self.windows_per_image = windows_per_image
        self.seed = seed
        self.windows_encoded = 0
        self._generator = torch.Generator()
        self._encoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        # Built anew rather than copied from the model: a resumed student is no teacher.
        encoder = encoder_from_config(cfg).to(cfg.MODEL.DEVICE)
        teacher = cfg.SPAR.TEACHER
        return {
            "teacher": SlidingWindowTeacher(encoder, teacher.WINDOW, teacher.STRIDE, teacher.BATCH_SIZE),
            "weight": cfg.SPAR.DISTILL.WEIGHT,
            "windows_per_image": teacher.WINDOWS_PER_IMAGE,
            "seed": max(cfg.SEED, 0),
        }

    def before_train(self) -> None:
        model = self.trainer.model
        encoder = find_encoder(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # Inside it, so that the loss is part of what it sees the model return.
            model = model.module
        self._handles = [
            encoder.register_forward_hook(self._remember),
            model.register_forward_hook(self._add_loss),
        ]

    def before_step(self) -> None:
        self._encoded.clear()
        # Every process draws other windows; the same step of the same process always draws the same.
        self._generator.manual_seed((self.seed * 1_000_003 + self.trainer.iter) * 1_009 + comm.get_rank())

    def after_train(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._encoded.clear()

    def _remember(self, encoder: DenseEncoder, inputs: tuple[torch.Tensor], features: torch.Tensor) -> None:
        # Evaluation between training steps runs without gradients.
        if torch.is_grad_enabled():
            self._encoded.append((inputs[0], features))

    def _add_loss(self, model: nn.Module, inputs: tuple, losses):
        encoded, self._encoded = self._encoded, []
        if not model.training:
            return None
        if not isinstance(losses, dict):
            raise RuntimeError(
                f"distillation needs a model that returns a dict of losses in training, "
                f"{type(model).__name__} returned {type(losses).__name__}"
            )
        if not encoded:
            raise RuntimeError("distillation found that the model did not run its SPAR encoder in this step")
        images = sum(len(x) for x, _ in encoded)
        total = sum(self._loss(x, features) * len(x) for x, features in encoded) / images
        get_event_storage().put_scalar("distill/windows_encoded", self.windows_encoded)
        return {**losses, LOSS_NAME: self.weight * total}

    def _loss(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        planned = len(self.teacher.plan(*x.shape[-2:]))
        if 0 < self.windows_per_image < planned:
            self.windows_encoded += len(x) * self.windows_per_image
            target = self.teacher.sample(x.detach(), self.windows_per_image, self._generator)
            return sampled_distillation_loss(features, target)
        self.windows_encoded += len(x) * planned
        return distillation_loss(features, self.teacher(x.detach()))
