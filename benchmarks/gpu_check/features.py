"""Encoders on the GPU, compared with a CPU: features in every precision, and attention kernels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.checks import COMPARISONS, FACTS, LIMITS, Fact, compare, without_tf32
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.waits import check_waits
from benchmarks.passes import random_image
from spar_d2.encoders import FAMILIES, DenseEncoder, build_encoder

_CPU = torch.device("cpu")
TITLE = "Encoders"


def named_models(settings: Settings) -> Iterator[tuple[str, DenseEncoder]]:
    """Yield the models of the settings with random weights, on the CPU."""
    for name in settings.models:
        encoder = build_encoder(name)
        for key, parameter in encoder.named_parameters():
            # With DINOv3's layer scale of 1e-5, the blocks of an untrained model would have almost no effect.
            if key.rpartition(".")[2].startswith("gamma"):
                torch.nn.init.ones_(parameter)
        yield name, encoder


def examples() -> Iterator[tuple[str, DenseEncoder]]:
    """Yield a tiny encoder of every family that has one, on the CPU."""
    for family in FAMILIES.values():
        torch.manual_seed(0)
        if (encoder := family.example()) is not None:
            yield f"{family.name} (tiny)", encoder.eval()


@torch.no_grad()
def check_features(record: Record, settings: Settings) -> None:
    """Compare dense and intermediate features of every family with a CPU, and with other precisions."""
    for name, encoder in (*examples(), *named_models(settings)):
        encoder.requires_grad_(False)
        on_device = copy.deepcopy(encoder).to(settings.device)
        for size in settings.sizes:
            subject, x = f"{name}, {size[1]}x{size[0]}", random_image(*size, _CPU)
            with without_tf32():
                exact = on_device(x.to(settings.device))
                middle = on_device.intermediates(x.to(settings.device), [-2])[0]
            _compare(record, subject, "float32, device and CPU", exact, encoder(x))
            expected = encoder.intermediates(x, [-2])[0]
            _compare(record, f"{subject}, last but one block", "float32, device and CPU", middle, expected)
            _compare_precisions(record, settings, subject, on_device, x.to(settings.device), exact)
        _check_attention(record, settings, name, on_device)
        x = random_image(*settings.sizes[-1], settings.device)
        frozen = copy.deepcopy(on_device).accelerate("bfloat16").freeze()
        check_waits(record, f"{name}, a pass in bfloat16", functools.partial(frozen, x), settings.device, 0)


def _compare(
    record: Record, subject: str, compared: str, found: torch.Tensor, expected: torch.Tensor, limit: str = "float32"
) -> None:
    record.add(TITLE, COMPARISONS, compare(subject, compared, found, expected, LIMITS[limit]))


def _compare_precisions(
    record: Record, settings: Settings, subject: str, encoder: DenseEncoder, x: torch.Tensor, exact: torch.Tensor
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _compare(record, subject, "float32 with TF32 and without", encoder(x), exact, "TF32")
    finally:
        torch.set_float32_matmul_precision(before)
    for precision in settings.precisions:
        found = copy.deepcopy(encoder).accelerate(precision)(x)
        _compare(record, subject, f"{precision} and float32", found, exact, precision)
        frozen = copy.deepcopy(encoder).accelerate(precision).freeze()(x)
        _compare(record, subject, f"{precision}, frozen, and float32", frozen, exact, precision)


def _check_attention(record: Record, settings: Settings, name: str, encoder: DenseEncoder) -> None:
    x = random_image(encoder.native_size, encoder.native_size, settings.device)
    for precision in ("float32", *settings.precisions):
        with SeenAttention() as seen:
            copy.deepcopy(encoder).accelerate(precision).freeze()(x)
        found = ", ".join(sorted(seen.kernels)) or "no attention"
        passed = bool(seen.kernels) and "math" not in seen.kernels
        record.add("Attention", FACTS, Fact(f"{name}, {precision}", "a fused kernel", found, passed))


class SeenAttention(TorchDispatchMode):
    """Records the attention implementations that run: names of fused kernels, or "math" for plain attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name.startswith("_scaled_dot_product_"):
            self.kernels.add(name.removeprefix("_scaled_dot_product_"))
        elif "softmax" in name:
            # Dense encoders use softmax only in attention.
            self.kernels.add("math")
        return func(*args, **(kwargs or {}))
