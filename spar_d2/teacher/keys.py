"""Cache keys of teachers and images: equal keys imply equal targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.utils.content_cache import digest

# Version of the target computation; increase it when targets change.
_ALGORITHM = 1
# Attributes that change the features only by rounding, or not at all.
_IGNORED = {"training", "frozen_outputs", "_compile", "_checkpointing", "_fixed_shape", "_is_cast"}
# Attributes of the encoder, which may be class or instance attributes.
_ENCODER_SETTINGS = ("reference_compat", "_precision", "patch_size", "native_size", "pixel_mean", "pixel_std")
_PIXEL_STEPS = 64


class Teacher(Protocol):
    """Interface of teachers whose targets can be cached."""

    encoder: DenseEncoder
    window: int
    stride: int

    def targets(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the targets (1, D, h, w) of images (3, H, W) that are normalized for the encoder."""
        ...


def teacher_key(teacher: Teacher) -> str:
    """Return a hash (32 hex digits) of the teacher's window, stride, precision, architecture and weights."""
    return encoder_key(teacher.encoder, teacher.window, teacher.stride)


def encoder_key(encoder: DenseEncoder, *settings: object) -> str:
    """Return a hash (32 hex digits) of an encoder's precision, architecture and weights, and of other settings."""
    own_settings = [str(getattr(encoder, name)) for name in _ENCODER_SETTINGS]
    parts: list[str | torch.Tensor] = [
        json.dumps([_ALGORITHM, *settings, *own_settings]),
        json.dumps([_settings(name, part) for name, part in encoder.named_modules()]),
    ]
    for name, tensor in encoder.state_dict().items():
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor]
    return digest(*parts)[:32]


def image_key(image: torch.Tensor, encoder: DenseEncoder) -> str:
    """Return a hash (32 hex digits) of the pixels of an image.

    Pixels are rounded to 1/64 of a gray level, so that rounding differences of the normalization between machines do
    not change the key.

    Args:
        image: (3, H, W), normalized for the encoder.
        encoder: encoder whose normalization is undone.
    """
    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    steps = ((image.float() * std + mean) * (255 * _PIXEL_STEPS)).round()
    # int16 is sufficient for pixels in 0..255, and faster to copy from a GPU and to hash.
    return _steps_checksum(steps.to(torch.int16 if steps.abs().max() < 2**15 else torch.int64))


def pixel_checksum(pixels: torch.Tensor) -> str:
    """Return :func:`image_key` of an image, from its pixels (3, H, W) uint8 RGB before normalization."""
    return _steps_checksum(pixels.to(torch.int16) * _PIXEL_STEPS)


def _steps_checksum(steps: torch.Tensor) -> str:
    return digest(f"{steps.dtype} {tuple(steps.shape)}", steps)[:32]


def _settings(name: str, module: nn.Module) -> list:
    """Return the class of a module and its plain attributes, such as number of heads, epsilon and activation."""
    settings = {}
    for key, value in vars(module).items():
        if key in _IGNORED or key in _ENCODER_SETTINGS:
            continue
        if isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
            settings[key] = str(value)
        elif isinstance(value, (tuple, list)) and all(isinstance(item, (bool, int, float, str)) for item in value):
            settings[key] = str(list(value))
        elif callable(value) and hasattr(value, "__qualname__"):
            settings[key] = value.__qualname__
    return [name, type(module).__qualname__, dict(sorted(settings.items()))]
