"""Trainer hook that adds distillation to any Detectron2 training."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from spar_d2.distillation.finite import FiniteCheck
from spar_d2.distillation.frozen_outputs import FrozenOutputs
from spar_d2.distillation.loss import distillation_loss, mean_cosine, sampled_distillation_loss
from spar_d2.distillation.match_inputs import EncodedImage, match
from spar_d2.distillation.projection import LeastSquaresProjection
from spar_d2.distillation.readings import Readings
from spar_d2.distillation.shapes import check_grid, check_shape
from spar_d2.distillation.targets import StepTargets
from spar_d2.encoders import DenseEncoder, find_encoder
from spar_d2.modeling.build import target_cache, teacher_from_config
from spar_d2.teacher import DenseTeacher, SampledTarget, TargetCache, as_teacher

LOSS_NAME = "loss_distill"
AVERAGES = ("image", "cell")
PROJECTIONS = ("", "least_squares")


class DistillationHook(HookBase):
    """Adds ``loss_distill`` to the loss dict of a model with a dense encoder.

    The hook works with any Detectron2 trainer that calls ``model(data)`` and sums a loss dict. It registers forward
    hooks on the model and on its encoder, wherever the encoder is in the model, and removes them after training. In
    each training step, the teacher encodes the same images as the student.

    The hook writes these values to the event storage: "distill/cosine" (mean cosine similarity of student features and
    targets), "distill/images_per_second", "distill/windows_per_second" and "distill/windows_encoded" (since the start
    of the run). On a GPU, the values of several steps are written together, and features are checked for NaN and
    infinity once per step, after the backward pass. Training fails before the first step if the encoder has no
    trainable parameters.

    ``DistillationHook(cfg)`` builds the teacher from ``MODEL.SPAR`` and ``SPAR.TEACHER``.

    Args:
        teacher: teacher that computes the targets, or a function from an image (3, H, W), normalized for the encoder,
            to its target (D, h, w), see :class:`~spar_d2.teacher.FunctionTeacher`.
        weight: weight of the loss, greater than 0.
        windows_per_image: number of randomly sampled windows per image; 0 uses all windows.
        seed: random seed of the sampled windows. A resumed run samples the same windows as an uninterrupted one.
        average: "image" averages the loss over the cells of the feature grid of each image, then over the images.
            "cell" averages it over all cells of the images in a step, across all processes.
        cache: cache of full targets. With ``windows_per_image``, it is read but not written.
        projection: "least_squares" maps the targets to the features of the student before training, see
            :class:`~spar_d2.distillation.projection.LeastSquaresProjection`; "" uses the targets as they are.
        projection_images: number of images that the projection is fitted on. In these steps, the loss is 0.
        frozen_outputs_gib: memory in GiB for the outputs of the frozen blocks at the start of the encoder; 0 computes
            them in every step.

    Raises:
        ValueError: an argument is invalid, or ``windows_per_image`` is set and the teacher cannot be sampled. In
            training: the targets do not have the shape of the student's features.
    """

    # Any object with the attributes model, iter and max_iter.
    trainer: Any

    @configurable
    def __init__(
        self,
        teacher: DenseTeacher | Callable[[torch.Tensor], torch.Tensor],
        weight: float = 1.0,
        windows_per_image: int = 0,
        seed: int = 0,
        average: str = "image",
        cache: TargetCache | None = None,
        projection: str = "",
        projection_images: int = 32,
        frozen_outputs_gib: float = 0.0,
    ) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(
                f"weight (SPAR.DISTILL.WEIGHT) must be greater than 0, got {weight}; to disable distillation, set "
                "SPAR.DISTILL.ENABLED False"
            )
        if windows_per_image < 0:
            raise ValueError(
                "windows_per_image (SPAR.TEACHER.WINDOWS_PER_IMAGE) must be 0 (all windows) or greater, "
                f"got {windows_per_image}"
            )
        if average not in AVERAGES:
            raise ValueError(f"average (SPAR.DISTILL.AVERAGE) must be one of {', '.join(AVERAGES)}; got {average!r}")
        if projection not in PROJECTIONS:
            raise ValueError(f'projection (SPAR.TEACHER.PROJECTION) must be "" or least_squares; got {projection!r}')
        self.teacher = as_teacher(teacher)
        if windows_per_image and not self.teacher.linear:
            raise ValueError(
                f"windows_per_image (SPAR.TEACHER.WINDOWS_PER_IMAGE) must be 0 with {type(self.teacher).__name__}: its "
                "targets are not linear in windows, so a sample of windows would give a biased gradient; "
                f"got {windows_per_image}"
            )
        self.projection = LeastSquaresProjection(projection_images) if projection else None
        self.weight = weight
        self.average = average
        self.cache = cache
        self._finite = FiniteCheck()
        self.targets = StepTargets(self.teacher, cache, windows_per_image, seed, self._finite)
        self.frozen_outputs = FrozenOutputs(frozen_outputs_gib) if frozen_outputs_gib else None
        self._inputs: object = None
        self._encoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._readings, self._device = Readings(), torch.device("cpu")
        self._start_counting()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        # Do not copy the model's encoder instead: in a resumed run, it already has the weights of the student.
        teacher = teacher_from_config(cfg)
        return {
            "teacher": teacher,
            "weight": cfg.SPAR.DISTILL.WEIGHT,
            "windows_per_image": cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE,
            "seed": max(cfg.SEED, 0),
            "average": cfg.SPAR.DISTILL.AVERAGE,
            "cache": target_cache(cfg, teacher) if cfg.SPAR.TEACHER.CACHE_DIR else None,
            "projection": cfg.SPAR.TEACHER.PROJECTION,
            "projection_images": cfg.SPAR.TEACHER.PROJECTION_IMAGES,
            "frozen_outputs_gib": cfg.SPAR.DISTILL.FROZEN_OUTPUTS_GIB,
        }

    @property
    def windows_encoded(self) -> int:
        """Number of windows, or other encoder passes of the teacher, since the start of the run."""
        return self.targets.total_passes

    def state_dict(self) -> dict:
        projection = {"projection": self.projection.state_dict()} if self.projection else {}
        return {"windows_encoded": self.windows_encoded, **projection}

    def load_state_dict(self, state: dict) -> None:
        self.targets.total_passes = state["windows_encoded"]
        if self.projection and "projection" in state:
            self.projection.load_state_dict(state["projection"])

    def target(self, image: torch.Tensor) -> torch.Tensor | None:
        """Return the full target (1, D, h, w) of an image (3, H, W); None until the projection is fitted."""
        if self.projection is None:
            return self.teacher.targets([image])[0]
        return cast(torch.Tensor, self.projection(self.teacher.targets([image])[0])) if self.projection.fitted else None

    def before_train(self) -> None:
        model = self.trainer.model
        encoder = find_encoder(model)
        self._device = next(encoder.parameters()).device
        trained = (name for name, parameter in encoder.named_parameters() if parameter.requires_grad)
        if all(re.match(encoder.unused, name) for name in trained):
            raise ValueError(
                "MODEL.SPAR.TRAINABLE selects no trainable parameters of the encoder, so distillation has no effect: "
                'set it to "last_blocks:2" or "all", for example, or set SPAR.DISTILL.ENABLED to False'
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # Hook the wrapped model, so that DistributedDataParallel finds the loss in its output.
            model = model.module
        encoder.frozen_outputs = self.frozen_outputs
        self._handles = [
            model.register_forward_pre_hook(self._remember_inputs),
            encoder.register_forward_hook(self._remember),
            model.register_forward_hook(self._add_loss),
        ]

    def before_step(self) -> None:
        self._start_counting()
        self._finite.start(self.trainer.iter)
        self.targets.start(self.trainer.iter, comm.get_rank())

    def after_backward(self) -> None:
        # Check before the optimizer step, while the device is still busy with the backward pass.
        self._finite.check()

    def after_step(self) -> None:
        self._finite.check()  # in case the trainer does not call after_backward()
        if not self._images:
            return
        counts = {"images": self._images, "windows": self.targets.passes, "encoded": self.windows_encoded}
        known = {**counts, "seconds": time.perf_counter() - self._since}
        iteration = self.trainer.iter
        self._readings.add(iteration, known, {"cosine": torch.stack(self._cosines).sum()})
        if self._readings.are_due(iteration, self.trainer.max_iter):
            self._readings.write(self._device)

    def after_train(self) -> None:
        # If there are several processes, one of them may have failed, and a collective operation would hang.
        if comm.get_world_size() == 1:
            self._readings.write(self._device)
        for handle in self._handles:
            handle.remove()
        if self._handles:
            find_encoder(self.trainer.model).frozen_outputs = None
        self._handles = []
        self._encoded, self._inputs = [], None

    def _start_counting(self) -> None:
        self._encoded = []
        self._images = 0
        self._cosines: list[torch.Tensor] = []
        self._since = time.perf_counter()

    def _remember_inputs(self, model: nn.Module, inputs: tuple) -> None:
        self._inputs = inputs[0] if inputs else None

    def _remember(self, encoder: DenseEncoder, inputs: tuple[torch.Tensor], features: torch.Tensor) -> None:
        # Evaluation between training steps runs without gradients.
        if torch.is_grad_enabled():
            self._encoded.append((inputs[0].detach(), features))

    def _add_loss(self, model: nn.Module, inputs: tuple, losses):
        encoded, self._encoded = self._encoded, []
        model_inputs, self._inputs = self._inputs, None
        if not model.training:
            return None
        if not isinstance(losses, dict):
            raise RuntimeError(
                f"distillation requires a model that returns a dict of losses in training, "
                f"but {type(model).__name__} returned {type(losses).__name__}"
            )
        if not encoded:
            raise RuntimeError("distillation failed: the model did not run its SPAR encoder in this step")
        return {**losses, LOSS_NAME: self.weight * self._loss(match(encoded, model_inputs))}

    def _loss(self, encoded: list[EncodedImage]) -> torch.Tensor:
        self._finite.note("the student's features", [image.features for image in encoded], encoded)
        if self.projection and not self.projection.fitted:
            targets = [self.targets.full(image) for image in encoded]
            for image, target in zip(encoded, targets):
                check_grid(image, target.shape)
            self.projection.add(targets, [image.features for image in encoded])
            # The features keep their gradient, which DistributedDataParallel expects.
            return torch.stack([image.features.float().sum() for image in encoded]).sum() * 0
        losses = []
        targets = self.targets.of(encoded)
        for image, target in zip(encoded, map(self.projection, targets) if self.projection else targets):
            student = image.features[None]
            check_shape(image, target)
            if isinstance(target, SampledTarget):
                losses.append(sampled_distillation_loss(student, target))
            else:
                losses.append(distillation_loss(student, target))
            self._cosines.append(mean_cosine(student, target))
        self._images += len(encoded)
        if self.average == "image":
            return torch.stack(losses).mean()
        cells = [image.features[0].numel() for image in encoded]
        total = losses[0].new_full((), sum(cells))
        if (processes := comm.get_world_size()) > 1:
            torch.distributed.all_reduce(total)
            # DistributedDataParallel averages gradients over processes.
            total = total / processes
        return sum(loss * number for loss, number in zip(losses, cells)) / total
