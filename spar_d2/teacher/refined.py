"""Teachers whose targets are refined: smoothed along a graph of patches, or upsampled and pooled again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from spar_d2.encoders import DenseEncoder
from spar_d2.refine.anyup import AnyUp, imagenet_normalized
from spar_d2.refine.patch_propagation import PatchGraph
from spar_d2.teacher.dense_teacher import DenseTeacher
from spar_d2.teacher.keys import teacher_key
from spar_d2.teacher.sliding import target_policy
from spar_d2.utils.content_cache import digest

# Rows of patches that are upsampled at a time.
_ROWS = 8


class RefinedTeacher(DenseTeacher, ABC):
    """Refines the targets of another teacher, each as a whole. Therefore, windows cannot be sampled.

    Args:
        teacher: teacher with an ``encoder``, such as :class:`~spar_d2.teacher.SlidingWindowTeacher`.
    """

    def __init__(self, teacher: DenseTeacher) -> None:
        self.teacher = teacher

    @property
    def encoder(self) -> DenseEncoder:
        """The encoder of the teacher."""
        return cast(Any, self.teacher).encoder

    @torch.no_grad()
    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self._refine(target, image) for target, image in zip(self.teacher.targets(images), images)]

    @abstractmethod
    def _refine(self, target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Refine the target (1, D, h, w) of an image (3, H, W)."""

    def cost(self, height: int, width: int, windows: int = 0) -> int:
        return self.teacher.cost(height, width, windows)


class SmoothedTeacher(RefinedTeacher):
    """Averages features over patches that are close and similar, by label propagation (LPOSS, arXiv:2503.19777).

    The features themselves are the guide of the graph. Propagation multiplies features by a factor that depends on the
    neighbors of a patch. A propagated column of ones is this factor, and the features are divided by it.

    Args:
        teacher: teacher with an ``encoder``.
        neighbours: number of neighbors of each patch.

    Raises:
        ValueError: ``neighbours`` is less than 1.
    """

    def __init__(self, teacher: DenseTeacher, neighbours: int = 400) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours (SPAR.TEACHER.NEIGHBOURS) must be at least 1, got {neighbours}")
        super().__init__(teacher)
        self.neighbours = neighbours

    def _refine(self, target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        # (1, D, h, w) -> (N, D + 1)
        columns = F.pad(target[0].flatten(1).T, (0, 1), value=1.0)
        graph = PatchGraph(target[0], self.encoder.patch_size, self.neighbours, check=False)
        spread = graph.propagate(columns, check=False)
        return (spread[:, :-1] / spread[:, -1:]).T.reshape(target.shape)

    def identity(self) -> str:
        return f"smoothed, {self.neighbours} neighbours, {teacher_key(self.teacher)}"


class UpsampledTeacher(RefinedTeacher):
    """Upsamples features along the edges of the image with AnyUp (arXiv:2510.12764), and averages them in each patch.

    Grids of a single row or column are not changed.

    Args:
        teacher: teacher with an ``encoder``.
        anyup: upsampling model, on the device of the images.
        factor: number of upsampled features along each side of a patch, at least 2.

    Raises:
        ValueError: ``factor`` is less than 2.
    """

    def __init__(self, teacher: DenseTeacher, anyup: AnyUp, factor: int = 4) -> None:
        if factor < 2:
            raise ValueError(f"factor (SPAR.TEACHER.UPSAMPLING) must be at least 2, got {factor}")
        super().__init__(teacher)
        self.anyup, self.factor = anyup, factor

    def _refine(self, target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        rows, columns = target.shape[2:]
        if min(rows, columns) < 2 or not target.isfinite().all():  # the caller reports NaN, and names the image
            return target
        encoder, factor = self.encoder, self.factor
        # Guidance must show the area of the features, which includes the padding.
        padded = target_policy(encoder).apply(image[None].float())
        mean, std = (torch.tensor(v).view(3, 1, 1).to(padded) for v in (encoder.pixel_mean, encoder.pixel_std))
        guide = imagenet_normalized(padded * std + mean)
        attention = self.anyup.prepare(guide, target, (rows * factor, columns * factor))
        bands = [slice(row * factor, min(row + _ROWS, rows) * factor) for row in range(0, rows, _ROWS)]
        return torch.cat([F.avg_pool2d(attention.rows(target, band), factor) for band in bands], dim=2)

    def identity(self) -> str:
        weights = digest(*(tensor for _, tensor in sorted(self.anyup.state_dict().items())))
        return f"upsampled by {self.factor}, {weights} {teacher_key(self.teacher)}"
