"""Compiled blocks, compared with eager ones on the device."""

from __future__ import annotations

import copy

import torch

from benchmarks.gpu_check.checks import COMPARISONS, LIMITS, compare, without_tf32
from benchmarks.gpu_check.features import examples, named_models
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.targets import GRADIENT_LIMITS, gradients
from benchmarks.passes import random_image
from spar_d2.encoders import DenseEncoder
from spar_d2.teacher import SampledTarget

TITLE = "Compiled blocks"


def check_compiled(record: Record, settings: Settings) -> None:
    """Compare features of several encoders, and gradients of one, with and without compiled blocks."""
    models, tiny = settings.compiled
    for number, (name, encoder) in enumerate(list(examples())[:tiny]):
        # A tiny encoder is sufficient to check the generated code.
        _compare_features(record, settings, name, encoder, "float32")
        if not number:
            _compare_gradients(record, settings, name, encoder)
    for name, encoder in list(named_models(settings))[:models]:
        for precision in ("bfloat16", "float32"):
            _compare_features(record, settings, name, encoder, precision)


@torch.no_grad()
def _compare_features(record: Record, settings: Settings, name: str, encoder: DenseEncoder, precision: str) -> None:
    plain, compiled = (
        copy.deepcopy(encoder).accelerate(precision, compile).freeze().to(settings.device) for compile in (False, True)
    )
    for size in settings.sizes:
        x = random_image(*size, settings.device)
        with without_tf32():
            found, expected = compiled(x), plain(x)
        subject, compared = f"{name}, {size[1]}x{size[0]}", f"{precision}, compiled and not"
        record.add(TITLE, COMPARISONS, compare(subject, compared, found, expected, LIMITS[precision]))


def _compare_gradients(record: Record, settings: Settings, name: str, encoder: DenseEncoder) -> None:
    x = random_image(*settings.sizes[0], settings.device)
    # A random target instead of the mean square of the features, whose gradient is only rounding noise after a last
    # norm.
    generator = torch.Generator().manual_seed(0)
    expected_features = torch.randn(1, encoder.embed_dim, *encoder.grid(*settings.sizes[0]), generator=generator)
    expected_features = expected_features.to(settings.device)
    target = SampledTarget(expected_features, torch.ones_like(expected_features[:, :1]))
    with without_tf32():
        expected, found = (
            gradients(copy.deepcopy(encoder).accelerate(compile=compile).to(settings.device), x, target)
            for compile in (False, True)
        )
    subject, compared = f"{name}, gradients of the last two blocks", "float32, compiled and not"
    limit = GRADIENT_LIMITS["float32"]
    record.add(TITLE, COMPARISONS, compare(subject, compared, found, expected, limit, dim=0))
