"""Teachers that encode changed images, and the mean of several teachers."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from spar_d2.encoders import DenseEncoder
from spar_d2.teacher.dense_teacher import DenseTeacher
from spar_d2.teacher.keys import teacher_key
from spar_d2.teacher.sliding import SampledTarget, target_policy

Grid = tuple[int, int]


class ChangedImages(DenseTeacher, ABC):
    """Applies a teacher to changed images, and maps the targets back to the grid of the images.

    Images are padded to whole patches first, so that features and patches stay aligned.

    Args:
        teacher: teacher with an ``encoder``, such as :class:`~spar_d2.teacher.SlidingWindowTeacher`.
    """

    def __init__(self, teacher: DenseTeacher) -> None:
        self.teacher = teacher
        self._policy = target_policy(self.encoder)

    @property
    def encoder(self) -> DenseEncoder:
        """The encoder of the teacher."""
        return cast(Any, self.teacher).encoder

    @property
    def linear(self) -> bool:
        return self.teacher.linear

    @abstractmethod
    def _change(self, image: torch.Tensor) -> torch.Tensor:
        """Change an image (3, h * p, w * p)."""

    @abstractmethod
    def _restore(self, features: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Map features (1, D, h', w') of a changed image to the grid of the image. It must be linear."""

    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        targets = self.teacher.targets(self._changed(images))
        return [self._restore(target, self._grid(image)) for target, image in zip(targets, images)]

    def samples(self, images: Sequence[torch.Tensor], windows: int, shifts: torch.Tensor) -> list[SampledTarget]:
        """See :meth:`SlidingWindowTeacher.samples <spar_d2.teacher.SlidingWindowTeacher.samples>`."""
        samples = cast(Any, self.teacher).samples(self._changed(images), windows, shifts)
        return [_apply(functools.partial(self._restore, grid=self._grid(x)), s) for s, x in zip(samples, images)]

    def _changed(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self._change(self._policy.apply(image[None])[0]) for image in images]

    def _grid(self, image: torch.Tensor) -> Grid:
        return self._policy.grid(*image.shape[-2:])


class MirroredTeacher(ChangedImages):
    """Encodes mirror images."""

    def _change(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(-1)

    def _restore(self, features: torch.Tensor, grid: Grid) -> torch.Tensor:
        return features.flip(-1)

    def identity(self) -> str:
        return f"mirrored {teacher_key(self.teacher)}"

    def cost(self, height: int, width: int, windows: int = 0) -> int:
        return self.teacher.cost(height, width, windows)


class RescaledTeacher(ChangedImages):
    """Encodes enlarged or reduced images. Features are resampled to the grid of the original image.

    Args:
        teacher: teacher with an ``encoder``.
        scale: factor of the sides, 0.25..4; sides are rounded to whole patches.

    Raises:
        ValueError: ``scale`` is out of range.
    """

    def __init__(self, teacher: DenseTeacher, scale: float) -> None:
        if not 0.25 <= scale <= 4:
            raise ValueError(f"scale (SPAR.TEACHER.ENSEMBLE) must be in 0.25..4, got {scale}")
        super().__init__(teacher)
        self.scale = scale

    def _size(self, grid: Grid) -> Grid:
        height, width = (max(1, round(cells * self.scale)) * self.encoder.patch_size for cells in grid)
        return height, width

    def _change(self, image: torch.Tensor) -> torch.Tensor:
        return _resample(image[None], self._size(self._grid(image)))[0]

    def _restore(self, features: torch.Tensor, grid: Grid) -> torch.Tensor:
        return _resample(features, grid)

    def identity(self) -> str:
        return f"scaled by {self.scale} {teacher_key(self.teacher)}"

    def cost(self, height: int, width: int, windows: int = 0) -> int:
        return self.teacher.cost(*self._size(self._policy.grid(height, width)), windows)


class EnsembleTeacher(DenseTeacher):
    """Mean of the targets of several teachers.

    Samples have ``windows`` windows of each teacher.

    Args:
        members: teachers with targets of the same shape.

    Raises:
        ValueError: there are no members.
    """

    def __init__(self, members: Sequence[DenseTeacher]) -> None:
        if not members:
            raise ValueError("members (SPAR.TEACHER.ENSEMBLE) must have at least one teacher, got none")
        self.members = list(members)

    @property
    def encoder(self) -> DenseEncoder:
        """The encoder of the first member."""
        return cast(Any, self.members[0]).encoder

    @property
    def linear(self) -> bool:
        return all(member.linear for member in self.members)

    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the mean targets.

        Raises:
            ValueError: the targets of the members differ in shape.
        """
        return [_mean(targets) for targets in zip(*(member.targets(images) for member in self.members))]

    def samples(self, images: Sequence[torch.Tensor], windows: int, shifts: torch.Tensor) -> list[SampledTarget]:
        """See :meth:`SlidingWindowTeacher.samples <spar_d2.teacher.SlidingWindowTeacher.samples>`."""
        count = len(self.members)
        # Shifted further, the windows of different members cover different parts of the image.
        samples = [
            cast(Any, member).samples(images, windows, (shifts + number / count) % 1)
            for number, member in enumerate(self.members)
        ]
        return [
            SampledTarget(
                _mean([part.weighted_sum for part in parts]),
                _mean([part.weight for part in parts]),
                sum(part.windows for part in parts),
            )
            for parts in zip(*samples)
        ]

    def identity(self) -> str:
        return f"mean of {' '.join(sorted(map(teacher_key, self.members)))}"

    def cost(self, height: int, width: int, windows: int = 0) -> int:
        return sum(member.cost(height, width, windows) for member in self.members)


def _apply(function: Callable[[torch.Tensor], torch.Tensor], sample: SampledTarget) -> SampledTarget:
    tensors = {name: function(getattr(sample, name)) for name in ("weighted_sum", "weight")}
    return dataclasses.replace(sample, **tensors)


def _mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            "SPAR.TEACHER.ENSEMBLE: the targets of all members must have the same shape, "
            f"got {' and '.join(map(str, sorted(shapes)))}"
        )
    return torch.stack(list(parts)).mean(0)


def _resample(x: torch.Tensor, size: Grid) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
