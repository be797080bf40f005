"""What a teacher's targets depend on, as a short text: equal texts, equal targets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder

# Changes with the way that targets are computed.
_ALGORITHM = 1
# How an encoder computes, which moves its features by rounding alone, and what is no setting.
_NO_MATTER = {"training", "_compile", "_checkpointing", "_fixed_shape", "_is_cast"}
# Those of the encoder itself, which may stand in its class or in the object.
_ENCODER_SETTINGS = ("reference_compat", "_precision", "patch_size", "native_size", "pixel_mean", "pixel_std")
_PIXEL_STEPS = 64


class Teacher(Protocol):
    """What keeping targets needs of a teacher."""

    encoder: DenseEncoder
    window: int
    stride: int

    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The targets (1, D, h, w) of images (3, H, W), as the encoder takes them."""
        ...


def teacher_key(teacher: Teacher) -> str:
    """32 hexadecimal digits that change with the teacher's window, stride, precision, architecture or weights."""
    digest = hashlib.sha256()
    settings = [str(getattr(teacher.encoder, name)) for name in _ENCODER_SETTINGS]
    digest.update(json.dumps([_ALGORITHM, teacher.window, teacher.stride, *settings]).encode())
    digest.update(json.dumps([_settings(name, part) for name, part in teacher.encoder.named_modules()]).encode())
    for name, tensor in teacher.encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def image_key(image: torch.Tensor, encoder: DenseEncoder) -> str:
    """32 hexadecimal digits that change with the pixels that an encoder is given.

    Images count as the same where no pixel differs by a 64th of a gray level, so that rounding in their normalization,
    which differs between machines, plays no part.

    Args:
        image: (3, H, W), normalized for the encoder.
    """
    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    steps = ((image.float() * std + mean) * (255 * _PIXEL_STEPS)).round()
    # Pixels in 0..255 take half the bytes to copy from a GPU and to digest.
    return _steps_checksum(steps.to(torch.int16 if steps.abs().max() < 2**15 else torch.int64))


def pixel_checksum(pixels: torch.Tensor) -> str:
    """What :func:`image_key` gives for the normalized image, from its pixels (3, H, W) uint8 in RGB."""
    return _steps_checksum(pixels.to(torch.int16) * _PIXEL_STEPS)


def _steps_checksum(steps: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{steps.dtype} {tuple(steps.shape)}".encode())
    digest.update(_bytes(steps))
    return digest.hexdigest()[:32]


def tensor_checksum(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits that change with a tensor's values."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> memoryview:
    # bfloat16 is no type of numpy's.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _settings(name: str, module: nn.Module) -> list:
    """A module's class and the plain values among its attributes: heads, epsilons, activation functions, ..."""
    found = {}
    for key, value in vars(module).items():
        if key in _NO_MATTER or key in _ENCODER_SETTINGS:
            continue
        if isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
            found[key] = str(value)
        elif isinstance(value, (tuple, list)) and all(isinstance(item, (bool, int, float, str)) for item in value):
            found[key] = str(list(value))
        elif callable(value) and hasattr(value, "__qualname__"):
            found[key] = value.__qualname__
    return [name, type(module).__qualname__, dict(sorted(found.items()))]
