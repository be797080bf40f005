"""Detects NaN and infinity in features and targets without waiting for the device."""

from __future__ import annotations

import torch

from spar_d2.distillation.match_inputs import EncodedImage


class FiniteCheck:
    """Collects the norms of tensors of a training step, and checks them later.

    Attributes:
        iteration: iteration of the step, for error messages.
    """

    def __init__(self) -> None:
        self.iteration = 0
        self._norms: list[tuple[str, EncodedImage, torch.Tensor]] = []

    def start(self, iteration: int) -> None:
        """Start a step."""
        self.iteration, self._norms = iteration, []

    def note(self, what: str, tensors: list[torch.Tensor], images: list[EncodedImage]) -> None:
        """Store the norm of a tensor of each image. On a CPU, it is checked at once, see :meth:`check`."""
        detached = [tensor.detach() for tensor in tensors]
        norms = torch._foreach_norm(detached)  # pyright: ignore[reportPrivateImportUsage]
        self._norms += [(what, image, norm) for image, norm in zip(images, norms)]
        if not norms[0].is_cuda:
            self.check()

    def check(self) -> None:
        """Raise ``FloatingPointError`` if a stored norm is not finite. A GPU is waited for once."""
        entries, self._norms = self._norms, []
        if entries and not torch.stack([norm for _, _, norm in entries]).isfinite().all():
            what, image, _ = next(entry for entry in entries if not entry[2].isfinite())
            raise self.error(f"{what} are NaN or infinite", image)

    def error(self, what: str, image: EncodedImage) -> FloatingPointError:
        """Return the error for an image."""
        return FloatingPointError(
            f"{what} for {image.name} at iteration {self.iteration}; this step was not saved. If the training "
            "diverged, reduce SOLVER.BASE_LR; for an overflow, set MODEL.SPAR.PRECISION to bfloat16 or float32; if the "
            "initial weights have NaN values, choose another MODEL.SPAR.PRETRAINED"
        )
