"""Cache keys of teachers and images: equal keys imply equal targets."""

from __future__ import annotations

import json
import re
import secrets
from typing import NamedTuple, Protocol

import torch
from torch import nn

from spar_d2.encoders import DenseEncoder
from spar_d2.teacher.dense_teacher import DenseTeacher
from spar_d2.utils.content_cache import digest

# Version of the target computation; increase it when targets change.
_ALGORITHM = 1
# Attributes that change the features only by rounding, or not at all.
_IGNORED = {"training", "frozen_outputs", "_compile", "_checkpointing", "_fixed_shape", "_is_cast"}
# Attributes of the encoder, which may be class or instance attributes.
_ENCODER_SETTINGS = ("reference_compat", "_precision", "patch_size", "native_size", "pixel_mean", "pixel_std")
_PIXEL_STEPS = 64


class Normalization(Protocol):
    """Pixel statistics of images, for example of an encoder: mean and standard deviation (RGB, pixels in 0..1)."""

    @property
    def pixel_mean(self) -> tuple[float, float, float]: ...

    @property
    def pixel_std(self) -> tuple[float, float, float]: ...


class PixelStatistics(NamedTuple):
    """Pixel mean and standard deviation (RGB, pixels in 0..1)."""

    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


def teacher_key(teacher: DenseTeacher) -> str:
    """Return a hash (32 hex digits) of everything that affects the targets of a teacher.

    Raises:
        ValueError: the teacher has no identity.
    """
    identity = teacher.identity()
    if not identity:
        raise ValueError(
            f"SPAR.TEACHER.CACHE_DIR: the targets of {type(teacher).__name__} cannot be cached, because its identity "
            'is empty; for a function, use FunctionTeacher(function, identity="name and version of the model"), or set '
            'SPAR.TEACHER.CACHE_DIR to ""'
        )
    return identity if re.fullmatch("[0-9a-f]{32}", identity) else digest(identity)[:32]


def result_key(teacher: DenseTeacher) -> str:
    """Return :func:`teacher_key`, or a random text for a teacher without identity, whose results are not reused."""
    return teacher_key(teacher) if teacher.identity() else secrets.token_hex(16)


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


def image_key(image: torch.Tensor, encoder: Normalization) -> str:
    """Return a hash (32 hex digits) of the pixels of an image.

    Pixels are rounded to 1/64 of a gray level, so that rounding differences of the normalization between machines do
    not change the key.

    Args:
        image: (3, H, W), normalized for the encoder.
        encoder: encoder, or other pixel statistics, whose normalization is undone.
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
