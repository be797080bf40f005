"""Interface of teachers, their registry, and teachers from plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from fvcore.common.registry import Registry

# Functions from a config to a teacher, by the value of SPAR.TEACHER.KIND.
TEACHER_REGISTRY = Registry("TEACHER")
TEACHER_REGISTRY.__doc__ = """
Registry of functions ``build(cfg)`` that return a :class:`DenseTeacher`, or a function as for :class:`FunctionTeacher`.
``SPAR.TEACHER.KIND`` is the name of the function.
"""


class DenseTeacher(Protocol):
    """Computes the targets of a distillation.

    Subclasses implement :meth:`targets`. Targets are on the grid of the student, with one feature for each of its
    patches.

    A teacher whose ``linear`` is True also has the method ``samples(images, windows, shifts)``, as
    :meth:`SlidingWindowTeacher.samples <spar_d2.teacher.SlidingWindowTeacher.samples>`: it returns an unbiased estimate
    of each target, a :class:`~spar_d2.teacher.SampledTarget`. This requires targets that are linear in the features of
    the windows.
    """

    @property
    def linear(self) -> bool:
        """Whether the targets can be estimated without bias from some of the windows."""
        return False

    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute targets.

        Args:
            images: images (3, H, W) of any sizes, normalized for the student's encoder.

        Returns:
            A target (1, D, h, w) float32 for each image, without gradient.
        """
        ...

    def identity(self) -> str:
        """Return a text that changes with everything that affects the targets. "" means that they cannot be cached."""
        return ""

    def cost(self, height: int, width: int, windows: int = 0) -> int:
        """Return the number of encoder passes for an image.

        Args:
            height, width: size of the image in pixels.
            windows: number of sampled windows; 0 for a full target.
        """
        return 1


class FunctionTeacher(DenseTeacher):
    """Teacher from a plain function.

    Args:
        function: maps an image (3, H, W), normalized for the student's encoder, to its target (D, h, w). It runs
            without gradients and autocast.
        identity: text that changes with everything that affects the targets, such as name and version of a model. "" if
            the targets must not be cached.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], identity: str = "") -> None:
        self.function = function
        self._identity = identity

    @torch.no_grad()
    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Apply the function to each image.

        Raises:
            ValueError: the function returns something other than (D, h, w).
        """
        with torch.autocast(images[0].device.type, enabled=False):
            return [self._checked(self.function(image), image)[None] for image in images]

    def identity(self) -> str:
        return self._identity

    def _checked(self, target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        if not isinstance(target, torch.Tensor) or target.ndim != 3 or not target.is_floating_point():
            got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, torch.Tensor) else type(target).__name__
            raise ValueError(f"teacher: the function must return features (D, h, w) for (3, H, W), got {got}")
        return target.to(image.device).float()


def as_teacher(teacher: Any) -> DenseTeacher:
    """Return a teacher as it is, and wrap a function with :class:`FunctionTeacher`.

    Raises:
        ValueError: the object is neither.
    """
    if isinstance(teacher, type):
        raise ValueError(
            f"teacher must be an object, got the class {teacher.__name__}: create one, {teacher.__name__}(...)"
        )
    missing = [name for name in ("targets", "identity", "cost") if not callable(getattr(teacher, name, None))]
    missing += [] if hasattr(teacher, "linear") else ["linear"]
    if not missing:
        return teacher
    if "targets" in missing and callable(teacher):
        return FunctionTeacher(cast(Any, teacher))
    raise ValueError(
        "teacher must be a function from an image (3, H, W) to features (D, h, w), or a DenseTeacher; "
        f"got {type(teacher).__name__} without {', '.join(missing)}"
    )
