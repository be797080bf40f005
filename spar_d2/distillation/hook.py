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
from detectron2.utils.events import get_event_storage
from torch import nn

from spar_d2.distillation.frozen_outputs import FrozenOutputs
from spar_d2.distillation.loss import distillation_loss, mean_cosine, sampled_distillation_loss
from spar_d2.distillation.match_inputs import EncodedImage, match
from spar_d2.distillation.projection import LeastSquaresProjection
from spar_d2.distillation.readings import Readings
from spar_d2.distillation.shapes import check_grid, check_shape
from spar_d2.encoders import DenseEncoder, find_encoder
from spar_d2.modeling.build import target_cache, teacher_from_config
from spar_d2.teacher import DenseTeacher, SampledTarget, TargetCache, as_teacher
from spar_d2.teacher.cache import LookedUp, TargetLookUp
from spar_d2.teacher.keys import image_key

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
        self.windows_per_image = windows_per_image
        self.seed = seed
        self.average = average
        self.cache = cache
        self.frozen_outputs = FrozenOutputs(frozen_outputs_gib) if frozen_outputs_gib else None
        self.windows_encoded = 0
        self._generator = torch.Generator()
        self._inputs: object = None
        self._encoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._readings = Readings()
        self._looks_up: bool | None = None
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

    def state_dict(self) -> dict:
        projection = {"projection": self.projection.state_dict()} if self.projection else {}
        return {"windows_encoded": self.windows_encoded, **projection}

    def load_state_dict(self, state: dict) -> None:
        self.windows_encoded = state["windows_encoded"]
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
        # The seed depends on iteration and process, so that sampled windows are reproducible.
        self._generator.manual_seed((self.seed * 1_000_003 + self.trainer.iter) * 1_009 + comm.get_rank())

    def after_backward(self) -> None:
        # Check before the optimizer step, while the device is still busy with the backward pass.
        self._raise_if_not_finite()

    def after_step(self) -> None:
        self._raise_if_not_finite()  # in case the trainer does not call after_backward()
        if not self._images:
            return
        counts = {"images": self._images, "windows": self._windows, "encoded": self.windows_encoded}
        known = {**counts, "seconds": time.perf_counter() - self._since}
        iteration = self.trainer.iter
        self._readings.add(iteration, known, {"cosine": torch.stack(self._cosines).sum()})
        if self._readings.are_due(iteration, self.trainer.max_iter):
            self._write_readings()

    def _write_readings(self) -> None:
        steps = self._readings.take()
        # float64, because float32 represents integers exactly only up to 16 million windows.
        names = ("cosine", "images", "windows", "encoded")
        sums = torch.tensor([[numbers[name] for name in names] for _, numbers in steps], dtype=torch.float64)
        if comm.get_world_size() > 1:
            sums = sums.to(self._device)
            torch.distributed.all_reduce(sums)
        storage = get_event_storage()
        for (iteration, numbers), (cosine, images, windows, encoded) in zip(steps, sums.tolist()):
            seconds = numbers["seconds"]
            values = {
                "distill/cosine": cosine / images,
                "distill/images_per_second": images / seconds,
                "distill/windows_per_second": windows / seconds,
            }
            storage.put_scalars(cur_iter=iteration, **values)
            storage.put_scalar("distill/windows_encoded", encoded, smoothing_hint=False, cur_iter=iteration)

    def after_train(self) -> None:
        # If there are several processes, one of them may have failed, and a collective operation would hang.
        if comm.get_world_size() == 1:
            self._write_readings()
        for handle in self._handles:
            handle.remove()
        if self._handles:
            find_encoder(self.trainer.model).frozen_outputs = None
        self._handles = []
        self._encoded, self._inputs = [], None

    def _start_counting(self) -> None:
        self._encoded = []
        self._images = self._windows = 0
        self._cosines: list[torch.Tensor] = []
        self._norms: list[tuple[str, EncodedImage, torch.Tensor]] = []
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
        self._note_norms("the student's features", [image.features for image in encoded], encoded)
        if self.projection and not self.projection.fitted:
            targets = [self._full_target(image) for image in encoded]
            for image, target in zip(encoded, targets):
                check_grid(image, target.shape)
            self.projection.add(targets, [image.features for image in encoded])
            # The features keep their gradient, which DistributedDataParallel expects.
            return torch.stack([image.features.float().sum() for image in encoded]).sum() * 0
        losses = []
        targets = self._targets(encoded)
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

    def _targets(self, encoded: list[EncodedImage]) -> list[torch.Tensor | SampledTarget]:
        """Return the target of each image: a full target (1, D, h, w), or a sampled target."""
        if self.windows_per_image:
            return self._sampled_targets(encoded)
        return [self._full_target(image) for image in encoded]

    def _sampled_targets(self, encoded: list[EncodedImage]) -> list[torch.Tensor | SampledTarget]:
        lookups = [self.cache.read(image.image, self._looked_up(image)) if self.cache else None for image in encoded]
        cached: list[torch.Tensor | SampledTarget] = [target for target in lookups if target is not None]
        if len(cached) == len(lookups):
            return cached
        missing = [image for image, target in zip(encoded, lookups) if target is None]
        shifts = torch.stack([self._shift(image) for image in missing])
        samples = cast(Any, self.teacher).samples([image.image for image in missing], self.windows_per_image, shifts)
        self._note_norms("the teacher's features", [sample.weighted_sum for sample in samples], missing)
        self._count_windows(sum(sample.windows for sample in samples))
        remaining = iter(samples)
        return [next(remaining) if target is None else target for target in lookups]

    def _full_target(self, image: EncodedImage) -> torch.Tensor:
        if self.cache is None:
            target = self.teacher.targets([image.image])[0]
            self._note_norms("the teacher's features", [target], [image])
            self._count_windows(self._planned(image))
            return target
        misses = self.cache.misses
        try:
            target = self.cache.target(image.image, self._looked_up(image))
        except FloatingPointError as error:
            raise self._not_finite(str(error), image) from error
        if self.cache.misses > misses:
            self._count_windows(self._planned(image))
        return target

    def _looked_up(self, image: EncodedImage) -> LookedUp | None:
        """Return the cache lookup of the data loader, or None if it is not of exactly the encoded pixels."""
        looked_up = image.records[0].get(TargetLookUp.NAME) if len(image.records) == 1 else None
        if looked_up is None or image.records[0]["image"].shape != image.image.shape:
            return None
        if self._looks_up is None:
            # Check once whether the model modifies images beyond normalization, which invalidates lookups.
            assert self.cache is not None  # only a cache looks up targets
            self._looks_up = image_key(image.image, self.cache.normalization) == looked_up.key
        return looked_up if self._looks_up else None

    def _planned(self, image: EncodedImage) -> int:
        """Return the number of encoder passes for the full target of an image."""
        return self.teacher.cost(*image.image.shape[-2:])

    def _count_windows(self, windows: int) -> None:
        self._windows += windows
        self.windows_encoded += windows

    def _shift(self, image: EncodedImage) -> torch.Tensor:
        """Return two random numbers that determine the sampled windows of an image.

        If the image's position in the run is known, it seeds them, so that they do not depend on the number of
        processes or on the other images of the step.
        """
        generator = self._generator
        if image.position is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + image.position)
        return torch.rand(2, generator=generator)

    def _note_norms(self, what: str, tensors: list[torch.Tensor], encoded: list[EncodedImage]) -> None:
        """Store the norms of tensors to detect NaN and infinity. On a GPU, they are checked after the backward pass."""
        detached = [tensor.detach() for tensor in tensors]
        norms = torch._foreach_norm(detached)  # pyright: ignore[reportPrivateImportUsage]
        self._norms += [(what, image, norm) for image, norm in zip(encoded, norms)]
        if not norms[0].is_cuda:
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        entries, self._norms = self._norms, []
        if entries and not torch.stack([norm for _, _, norm in entries]).isfinite().all():
            what, image, _ = next(entry for entry in entries if not entry[2].isfinite())
            raise self._not_finite(f"{what} are NaN or infinite", image)

    def _not_finite(self, what: str, image: EncodedImage) -> FloatingPointError:
        return FloatingPointError(
            f"{what} for {image.name} at iteration {self.trainer.iter}; this step was not saved. If the training "
            "diverged, reduce SOLVER.BASE_LR; for an overflow, set MODEL.SPAR.PRECISION to bfloat16 or float32; if the "
            "initial weights have NaN values, choose another MODEL.SPAR.PRETRAINED"
        )
