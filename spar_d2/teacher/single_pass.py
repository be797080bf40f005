"""Teacher that encodes each image in a single pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.teacher.keys import encoder_key
from spar_d2.teacher.sliding import SampledTarget


class SinglePassTeacher(nn.Module):
    """A frozen copy of an encoder that is applied to whole images.

    Args:
        encoder: encoder to copy, usually with a better and slower read-out than that of the student.
    """

    # There are no windows, and every sample is the full target.
    linear = True

    def __init__(self, encoder: DenseEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).freeze()
        self.eval()

    def train(self, mode: bool = True) -> SinglePassTeacher:
        """Do nothing: the teacher always stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the features (1, D, h, w) of images (3, H, W) of any sizes."""
        with torch.autocast(images[0].device.type, enabled=False):
            return [self.encoder(image[None]).float() for image in images]

    def samples(self, images: Sequence[torch.Tensor], windows: int, shifts: torch.Tensor) -> list[SampledTarget]:
        """Return the full target of each image as a sample; the other arguments have no effect."""
        return [SampledTarget(target, torch.ones_like(target[:, :1]), 1) for target in self.targets(images)]

    def identity(self) -> str:
        return encoder_key(self.encoder, "single pass")

    def cost(self, height: int, width: int, windows: int = 0) -> int:
        return 1
