"""Teacher targets and gradients on the GPU, compared with a CPU."""

from __future__ import annotations

import copy
import functools

import torch

from benchmarks.gpu_check.checks import COMPARISONS, FACTS, LIMITS, Fact, compare, without_tf32
from benchmarks.gpu_check.features import examples, named_models
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings
from benchmarks.gpu_check.waits import check_waits
from benchmarks.passes import random_image
from spar_d2.distillation import sampled_distillation_loss
from spar_d2.encoders import DenseEncoder, set_trainable
from spar_d2.teacher import SampledTarget, SlidingWindowTeacher

_CPU = torch.device("cpu")
_WINDOWS = 6
# Gradients of a few blocks are sums over all patches, whose terms cancel.
GRADIENT_LIMITS = {"float32": 1e-3, "bfloat16": 0.3}
TEACHER, GRADIENTS = "Teacher", "Gradients"


def check_targets(record: Record, settings: Settings) -> None:
    """Check full and sampled targets of every family, their reproducibility, and gradients."""
    for name, encoder in (*examples(), *named_models(settings)):
        window = encoder.native_size
        # One size is smaller than a window in one direction; the other is odd and larger than a window.
        sizes = ((window // 2, window), (window + 37, window + 85))
        images = [random_image(*size, _CPU)[0] for size in sizes]
        on_cpu = SlidingWindowTeacher(encoder, stride=24)
        teacher = SlidingWindowTeacher(copy.deepcopy(encoder).to(settings.device), stride=24)
        own = [image.to(settings.device) for image in images]
        shifts = torch.rand(len(images), 2, generator=torch.Generator().manual_seed(0))
        with without_tf32():
            exact = teacher.targets(own)
            sampled = teacher.samples(own, _WINDOWS, shifts)
        expected, expected_samples = on_cpu.targets(images), on_cpu.samples(images, _WINDOWS, shifts)
        for size, *results in zip(sizes, exact, expected, sampled, expected_samples):
            _compare_targets(record, f"{name}, {size[1]}x{size[0]}", *results)
        for precision in ("float32", *settings.precisions):
            _compare_runs(record, settings, name, precision, copy.deepcopy(encoder), own, exact)
        _compare_gradients(record, settings, name, encoder, images[1], expected_samples[1])


def _compare_targets(
    record: Record,
    subject: str,
    found: torch.Tensor,
    expected: torch.Tensor,
    sampled: SampledTarget,
    expected_sample: SampledTarget,
) -> None:
    pairs = {
        "all windows": (found, expected),
        f"{_WINDOWS} windows": (sampled.weighted_sum, expected_sample.weighted_sum),
        f"weights of {_WINDOWS} windows": (sampled.weight, expected_sample.weight),
    }
    for quantity, pair in pairs.items():
        compared = "float32, device and CPU"
        record.add(TEACHER, COMPARISONS, compare(f"{subject}, {quantity}", compared, *pair, LIMITS["float32"]))


def _compare_runs(
    record: Record,
    settings: Settings,
    name: str,
    precision: str,
    encoder: DenseEncoder,
    images: list[torch.Tensor],
    exact: list[torch.Tensor],
) -> None:
    """Compare the targets of a precision with exact ones, and those of two runs with each other."""
    teacher = SlidingWindowTeacher(encoder.accelerate(precision).to(settings.device), stride=24)
    first, second = teacher.targets(images), teacher.targets(images)
    call = functools.partial(teacher.targets, images)
    check_waits(record, f"teacher of {name}, {precision}, {len(images)} images", call, settings.device, 2)
    limit = LIMITS["TF32" if precision == "float32" else precision]
    compared = f"{precision} and float32 without TF32"
    record.add(TEACHER, COMPARISONS, compare(f"{name}, all windows", compared, first[1], exact[1], limit))
    same = all(map(torch.equal, first, second))
    found = "the same" if same else f"{sum((a != b).sum().item() for a, b in zip(first, second))} numbers differ"
    question = "two runs give the same bits"
    record.add("Reproducibility", FACTS, Fact(f"teacher of {name}, {precision}", question, found, same))


def _compare_gradients(
    record: Record, settings: Settings, name: str, encoder: DenseEncoder, image: torch.Tensor, target: SampledTarget
) -> None:
    own = copy.deepcopy(encoder).to(settings.device)
    device_target = SampledTarget(target.weighted_sum.to(settings.device), target.weight.to(settings.device))
    expected = gradients(copy.deepcopy(encoder), image[None], target)
    with without_tf32():
        found = gradients(own, image[None].to(settings.device), device_target)
    pairs = {"float32, device and CPU": ("float32", found, expected)}
    half = gradients(own.accelerate("bfloat16"), image[None].to(settings.device), device_target)
    pairs["bfloat16 and float32"] = ("bfloat16", half, found)
    for compared, (precision, *pair) in pairs.items():
        limit = GRADIENT_LIMITS[precision]
        record.add(GRADIENTS, COMPARISONS, compare(f"{name}, last two blocks", compared, *pair, limit, dim=0))


def gradients(encoder: DenseEncoder, x: torch.Tensor, target: SampledTarget) -> torch.Tensor:
    """Return the gradients of the last two blocks for the sampled loss, as one vector; modifies the encoder."""
    set_trainable(encoder, "last_blocks:2")
    encoder.train()
    # Without loss scaling, because float16 is not compared.
    sampled_distillation_loss(encoder(x), target).backward()
    found = [parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]
    encoder.zero_grad(set_to_none=True)
    return torch.cat(found)
