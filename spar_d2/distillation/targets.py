"""Targets of the images of a training step, from the teacher or from a cache."""

from __future__ import annotations

from typing import Any, cast

import torch

from spar_d2.distillation.finite import FiniteCheck
from spar_d2.distillation.match_inputs import EncodedImage
from spar_d2.teacher import DenseTeacher, SampledTarget, TargetCache
from spar_d2.teacher.cache import LookedUp, TargetLookUp
from spar_d2.teacher.keys import image_key


class StepTargets:
    """Computes the targets of images, and counts encoder passes of the teacher.

    Args:
        teacher: teacher that computes the targets.
        cache: cache of full targets. If windows are sampled, it is read but not written.
        windows_per_image: number of randomly sampled windows per image; 0 uses all windows.
        seed: random seed of the sampled windows.
        finite: collects the norms of the targets.

    Attributes:
        passes: encoder passes in this step.
        total_passes: encoder passes since the start of the run.
    """

    def __init__(
        self, teacher: DenseTeacher, cache: TargetCache | None, windows_per_image: int, seed: int, finite: FiniteCheck
    ) -> None:
        self.teacher, self.cache, self.windows_per_image, self.seed = teacher, cache, windows_per_image, seed
        self.passes = self.total_passes = 0
        self._finite = finite
        self._generator = torch.Generator()
        self._looks_up: bool | None = None

    def start(self, iteration: int, rank: int) -> None:
        """Start a step of a process."""
        self.passes = 0
        # The seed depends on iteration and process, so that sampled windows are reproducible.
        self._generator.manual_seed((self.seed * 1_000_003 + iteration) * 1_009 + rank)

    def of(self, images: list[EncodedImage]) -> list[torch.Tensor | SampledTarget]:
        """Return the target of each image: a full target (1, D, h, w), or a sampled target."""
        if self.windows_per_image:
            return self._sampled(images)
        return [self.full(image) for image in images]

    def full(self, image: EncodedImage) -> torch.Tensor:
        """Return the full target (1, D, h, w) of an image."""
        if self.cache is None:
            target = self.teacher.targets([image.image])[0]
            self._finite.note("the teacher's features", [target], [image])
            self._count(self._planned(image))
            return target
        misses = self.cache.misses
        try:
            target = self.cache.target(image.image, self._looked_up(image))
        except FloatingPointError as error:
            raise self._finite.error(str(error), image) from error
        if self.cache.misses > misses:
            self._count(self._planned(image))
        return target

    def _sampled(self, images: list[EncodedImage]) -> list[torch.Tensor | SampledTarget]:
        lookups = [self.cache.read(image.image, self._looked_up(image)) if self.cache else None for image in images]
        cached: list[torch.Tensor | SampledTarget] = [target for target in lookups if target is not None]
        if len(cached) == len(lookups):
            return cached
        missing = [image for image, target in zip(images, lookups) if target is None]
        shifts = torch.stack([self._shift(image) for image in missing])
        samples = cast(Any, self.teacher).samples([image.image for image in missing], self.windows_per_image, shifts)
        self._finite.note("the teacher's features", [sample.weighted_sum for sample in samples], missing)
        self._count(sum(sample.windows for sample in samples))
        remaining = iter(samples)
        return [next(remaining) if target is None else target for target in lookups]

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

    def _count(self, passes: int) -> None:
        self.passes += passes
        self.total_passes += passes

    def _shift(self, image: EncodedImage) -> torch.Tensor:
        """Return two random numbers that determine the sampled windows of an image.

        If the image's position in the run is known, it seeds them, so that they do not depend on the number of
        processes or on the other images of the step.
        """
        generator = self._generator
        if image.position is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + image.position)
        return torch.rand(2, generator=generator)
