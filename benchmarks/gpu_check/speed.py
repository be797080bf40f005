"""Speed and memory of encoders, teacher and post-processing, measured with the code of ``tools/benchmark.py``."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import torch

from benchmarks import encoders, postprocess, refinement, teacher
from benchmarks.gpu_check.labels import kernel_off
from benchmarks.gpu_check.machine import peak_tflops
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.settings import Settings
from benchmarks.tables import Table
from spar_d2.encoders import build_encoder

_PRECISIONS = ("bfloat16", "float32")
# Fraction of the free memory that full maps may use.
_MEMORY_FRACTION = 0.7
_STRIDE = 24


def measure_encoders(record: Record, settings: Settings) -> None:
    """Measure single passes, compared with the libraries, in bfloat16 first; then one size with compiled blocks."""
    table, device = _with_share_of_peak(settings.device), settings.device
    for precision in _PRECISIONS:
        for name in settings.models:
            options = {"repeats": settings.repeats, "limit": settings.limit}
            for measurement in encoders.measure_encoder(name, settings.speed_sizes, [precision], device, **options):
                record.add("Single passes", table, measurement)
    # Compilation takes half a minute and comes last, so that little is lost if the time limit is reached.
    size = settings.speed_sizes[len(settings.speed_sizes) // 3]
    for name in settings.models[: settings.compiled[0]]:
        options = {"repeats": settings.repeats, "compile": True, "limit": settings.limit}
        for measurement in encoders.measure_encoder(name, [size], ["bfloat16"], device, **options):
            record.add("Single passes, our blocks compiled", table, measurement)


def _with_share_of_peak(device: torch.device) -> Table:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""

    def share(measured: encoders.Measurement) -> str:
        peak = peak_tflops(name, measured.precision)
        if peak is None:
            return "-"
        return f"{measured.flops / measured.seconds / peak / 1e10:.0f} %"

    note = (
        "share of peak: TFLOP/s relative to the specification for dense products (float32 without TF32); not available "
        'for every GPU ("-").'
    )
    columns = {**encoders.TABLE.columns, "share of peak": share}
    return dataclasses.replace(encoders.TABLE, columns=columns, always=(*encoders.TABLE.always, note))


def measure_teachers(record: Record, settings: Settings) -> None:
    """Measure targets, compared with the straightforward implementation, and single passes over the same images."""
    for precision in _PRECISIONS:
        for name in settings.models:
            # In float32, which is rarely used on a GPU, a quarter of the windows is sufficient.
            windows = settings.teacher_windows
            windows = windows // 4 if windows and precision == "float32" else windows
            measured = teacher.measure_teacher(
                name,
                settings.teacher_sizes,
                [precision],
                settings.device,
                _STRIDE,
                batch_size=0,
                windows=windows,
                repeats=settings.repeats,
                student=True,
                limit=settings.limit,
            )
            for measurement in measured:
                record.add(f"Teacher, stride {_STRIDE}, and student", teacher.WITH_STUDENT, measurement)


def measure_labels(record: Record, settings: Settings) -> None:
    """Measure labels from features, compared with full maps, and the evaluator, compared with Detectron2's."""
    name = settings.models[0]
    encoder = build_encoder(name).requires_grad_(False).to(settings.device)
    image = postprocess.normalized(postprocess.picture(None, settings.label_side), encoder)
    options = (list(settings.words), settings.repeats, int(_MEMORY_FRACTION * _free_bytes(settings.device)))
    for measurement in postprocess.measure_postprocess(encoder, image, *options):
        record.add(f"From features of {name} to labels", postprocess.TABLE, measurement)
    if settings.device.type == "cuda":
        with kernel_off():
            for measurement in postprocess.measure_postprocess(encoder, image, *options[:2], room=0):
                record.add(f"From features of {name} to labels, in bands", postprocess.TABLE, measurement)
    del encoder, image
    # Imported here because the other speed measurements do not need Detectron2.
    from benchmarks import semantic_evaluator as evaluator_speed

    with tempfile.TemporaryDirectory() as folder:
        for evaluation in evaluator_speed.measure_evaluators(Path(folder), settings.evaluated, settings.device):
            record.add("Semantic evaluator", evaluator_speed.TABLE, evaluation)


def measure_refinements(record: Record, settings: Settings) -> None:
    """Measure the steps of refinement, compared with all of an image at once."""
    image = refinement.as_image(postprocess.picture(None, settings.label_side), settings.device)
    options = (list(settings.words[:1]), 1, int(_MEMORY_FRACTION * _free_bytes(settings.device)))
    for measurement in refinement.measure_refinement(image, list(refinement.STEPS), *options):
        record.add("Refinement", refinement.TABLE, measurement)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
