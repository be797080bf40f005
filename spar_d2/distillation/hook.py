"""The trainer hook that adds distillation to any Detectron2 training."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from spar_d2.distillation.loss import distillation_loss, mean_cosine, sampled_distillation_loss
from spar_d2.distillation.match_inputs import EncodedImage, match
from spar_d2.distillation.readings import Readings
from spar_d2.encoders import DenseEncoder, find_encoder
from spar_d2.modeling.build import teacher_from_config
from spar_d2.teacher import SampledTarget, SlidingWindowTeacher, TargetCache
from spar_d2.teacher.cache import LookedUp, TargetLookUp
from spar_d2.teacher.keys import image_key

LOSS_NAME = "loss_distill"
AVERAGES = ("image", "cell")


class DistillationHook(HookBase):
    """Adds ``loss_distill`` to the loss dict of a model that holds a dense encoder.

    The hook listens to the encoder, wherever in the model it is: whatever images it encodes in a training step, the
    teacher encodes too. It works with any trainer of Detectron2's that calls ``model(data)`` and sums a loss dict, and
    takes itself off the model after training. To the trainer's storage it adds "distill/cosine" (mean cosine of the
    student's features and what the teacher says of them), "distill/images_per_second", "distill/windows_per_second" and
    "distill/windows_encoded"; on a GPU those of several steps at once. Whether features are finite is then checked
    once a step, after the backward pass. An encoder of which nothing is trained is refused before the first step.

    ``DistillationHook(cfg)`` builds the teacher from ``MODEL.SPAR`` and ``SPAR.TEACHER``.

    Args:
        teacher: gives the targets.
        weight: factor on the loss, above 0.
        windows_per_image: windows that the teacher encodes for each image, drawn at random; 0 for all.
        seed: of the random windows; a run that is resumed draws on as if it had not stopped.
        average: the loss is the mean over the cells of each "image", then over images, or over every "cell" of the
            images that all processes encode together.
        cache: keeps the full targets; with ``windows_per_image`` it is only read.

    Raises:
        ValueError: a ``weight`` that is not above 0, a negative ``windows_per_image``, another ``average``.
    """

    # Any that has a model.
    trainer: Any

    @configurable
    def __init__(
        self,
        teacher: SlidingWindowTeacher,
        weight: float = 1.0,
        windows_per_image: int = 0,
        seed: int = 0,
        average: str = "image",
        cache: TargetCache | None = None,
    ) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(f"weight (SPAR.DISTILL.WEIGHT) must be above 0 (or ENABLED False), got {weight}")
        if windows_per_image < 0:
            raise ValueError(
                f"windows_per_image (SPAR.TEACHER.WINDOWS_PER_IMAGE) must be 0 (all) or more, got {windows_per_image}"
            )
        if average not in AVERAGES:
            raise ValueError(f"average (SPAR.DISTILL.AVERAGE) must be one of {', '.join(AVERAGES)}; got {average!r}")
        self.teacher = teacher
        self.weight = weight
        self.windows_per_image = windows_per_image
        self.seed = seed
        self.average = average
        self.cache = cache
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
        # Built anew rather than copied from the model: a resumed student is no teacher.
        teacher = teacher_from_config(cfg)
        folder = cfg.SPAR.TEACHER.CACHE_DIR
        return {
            "teacher": teacher,
            "weight": cfg.SPAR.DISTILL.WEIGHT,
            "windows_per_image": cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE,
            "seed": max(cfg.SEED, 0),
            "average": cfg.SPAR.DISTILL.AVERAGE,
            "cache": TargetCache(folder, teacher) if folder else None,
        }

    def state_dict(self) -> dict:
        return {"windows_encoded": self.windows_encoded}

    def load_state_dict(self, state: dict) -> None:
        self.windows_encoded = state["windows_encoded"]

    def before_train(self) -> None:
        model = self.trainer.model
        encoder = find_encoder(model)
        trained = (name for name, parameter in encoder.named_parameters() if parameter.requires_grad)
        if all(re.match(encoder.unused, name) for name in trained):
            raise ValueError(
                "MODEL.SPAR.TRAINABLE leaves nothing of the encoder to train, so the teacher would run for nothing: "
                'set it to what the student is to learn with ("last_blocks:2", "all"), or SPAR.DISTILL.ENABLED to False'
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # Inside it, so that the loss is part of what it sees the model return.
            model = model.module
        self._handles = [
            model.register_forward_pre_hook(self._remember_inputs),
            encoder.register_forward_hook(self._remember),
            model.register_forward_hook(self._add_loss),
        ]

    def before_step(self) -> None:
        self._start_counting()
        # Every process draws other windows; the same step of the same process always draws the same.
        self._generator.manual_seed((self.seed * 1_000_003 + self.trainer.iter) * 1_009 + comm.get_rank())

    def after_backward(self) -> None:
        # Before the weights are changed, and while the device has the backward pass to work on.
        self._raise_if_not_finite()

    def after_step(self) -> None:
        if not self._images:
            return
        self._raise_if_not_finite()  # where the trainer calls no hooks after its backward pass
        counts = {"images": self._images, "windows": self._windows, "encoded": self.windows_encoded}
        known = {**counts, "seconds": time.perf_counter() - self._since}
        iteration = self.trainer.iter
        self._readings.add(iteration, known, {"cosine": torch.stack(self._cosines).sum()})
        if self._readings.are_due(iteration, self.trainer.max_iter):
            self._write_readings()

    def _write_readings(self) -> None:
        steps = self._readings.take()
        # float32 counts windows exactly up to 16 million; those of a whole run are more.
        names = ("cosine", "images", "windows", "encoded")
        sums = torch.tensor([[numbers[name] for name in names] for _, numbers in steps], dtype=torch.float64)
        if comm.get_world_size() > 1:
            sums = sums.to(next(self.teacher.parameters()).device)
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
        # One of several processes may have failed, and then nobody answers.
        if comm.get_world_size() == 1:
            self._write_readings()
        for handle in self._handles:
            handle.remove()
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
        given, self._inputs = self._inputs, None
        if not model.training:
            return None
        if not isinstance(losses, dict):
            raise RuntimeError(
                f"distillation needs a model that returns a dict of losses in training, "
                f"{type(model).__name__} returned {type(losses).__name__}"
            )
        if not encoded:
            raise RuntimeError("distillation found that the model did not run its SPAR encoder in this step")
        return {**losses, LOSS_NAME: self.weight * self._loss(match(encoded, given))}

    def _loss(self, encoded: list[EncodedImage]) -> torch.Tensor:
        self._note_norms("the student's features", [one.features for one in encoded], encoded)
        targets = self._targets(encoded)
        losses = []
        for one, target in zip(encoded, targets):
            student = one.features[None]
            sampled = isinstance(target, SampledTarget)
            loss = sampled_distillation_loss(student, target) if sampled else distillation_loss(student, target)
            losses.append(loss)
            self._cosines.append(mean_cosine(student, target))
        self._images += len(encoded)
        if self.average == "image":
            return torch.stack(losses).mean()
        cells = [one.features[0].numel() for one in encoded]
        total = losses[0].new_full((), sum(cells))
        if (processes := comm.get_world_size()) > 1:
            torch.distributed.all_reduce(total)
            # Gradients are averaged over processes.
            total = total / processes
        return sum(loss * number for loss, number in zip(losses, cells)) / total

    def _targets(self, encoded: list[EncodedImage]) -> list[torch.Tensor | SampledTarget]:
        """What the teacher says of each image: (1, D, h, w), or of a few windows only."""
        if self.windows_per_image:
            return self._sampled_targets(encoded)
        return [self._full_target(one) for one in encoded]

    def _sampled_targets(self, encoded: list[EncodedImage]) -> list[torch.Tensor | SampledTarget]:
        found = [self.cache.read(one.image, self._looked_up(one)) if self.cache else None for one in encoded]
        cached: list[torch.Tensor | SampledTarget] = [target for target in found if target is not None]
        if len(cached) == len(found):
            return cached
        left = [one for one, target in zip(encoded, found) if target is None]
        shifts = torch.stack([self._shift(one) for one in left])
        samples = self.teacher.samples([one.image for one in left], self.windows_per_image, shifts)
        self._note_norms("the teacher's features", [sample.weighted_sum for sample in samples], left)
        self._count_windows(sum(min(self.windows_per_image, self._planned(one)) for one in left))
        drawn = iter(samples)
        return [next(drawn) if target is None else target for target in found]

    def _full_target(self, one: EncodedImage) -> torch.Tensor:
        if self.cache is None:
            target = self.teacher.targets([one.image])[0]
            self._note_norms("the teacher's features", [target], [one])
            self._count_windows(self._planned(one))
            return target
        missed = self.cache.misses
        try:
            target = self.cache.target(one.image, self._looked_up(one))
        except FloatingPointError as error:
            raise self._not_finite(str(error), one) from error
        if self.cache.misses > missed:
            self._count_windows(self._planned(one))
        return target

    def _looked_up(self, one: EncodedImage) -> LookedUp | None:
        """What was found of its target when the image was read, if the encoder was given just that image."""
        found = one.records[0].get(TargetLookUp.NAME) if len(one.records) == 1 else None
        if found is None or one.records[0]["image"].shape != one.image.shape:
            return None
        if self._looks_up is None:
            # Once: a model may do more to images than to normalize them.
            self._looks_up = image_key(one.image, self.teacher.encoder) == found.key
        return found if self._looks_up else None

    def _planned(self, one: EncodedImage) -> int:
        """Windows of an image, all of them."""
        return len(self.teacher.plan(*one.image.shape[-2:]))

    def _count_windows(self, windows: int) -> None:
        self._windows += windows
        self.windows_encoded += windows

    def _shift(self, one: EncodedImage) -> torch.Tensor:
        """Two random numbers, by the image's place in the run where it is known: then neither the number of processes
        nor the images beside it change what is drawn for it."""
        generator = self._generator
        if one.position is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + one.position)
        return torch.rand(2, generator=generator)

    def _note_norms(self, what: str, tensors: list[torch.Tensor], encoded: list[EncodedImage]) -> None:
        """Remember lengths of tensors, which are finite where the tensors are; on a GPU they are looked at later."""
        detached = [tensor.detach() for tensor in tensors]
        norms = torch._foreach_norm(detached)  # pyright: ignore[reportPrivateImportUsage]
        self._norms += [(what, one, norm) for one, norm in zip(encoded, norms)]
        if not norms[0].is_cuda:
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        noted, self._norms = self._norms, []
        if noted and not torch.stack([norm for _, _, norm in noted]).isfinite().all():
            what, one, _ = next(note for note in noted if not note[2].isfinite())
            raise self._not_finite(f"{what} are NaN or infinite", one)

    def _not_finite(self, what: str, one: EncodedImage) -> FloatingPointError:
        return FloatingPointError(
            f"{what} for {one.name} at iteration {self.trainer.iter}; this step was not saved. Weights that diverged "
            "need a lower SOLVER.BASE_LR, an overflow needs MODEL.SPAR.PRECISION bfloat16 or float32, and weights "
            "that are NaN from the start need another MODEL.SPAR.PRETRAINED"
        )
