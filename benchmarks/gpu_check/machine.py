"""What machine and which versions a measurement was made with."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess

import torch

from benchmarks.measure import describe_machine

# Distributions, and the modules that tell their version where they lie in a plain folder.
_PACKAGES = {"triton": "triton", "timm": "timm", "open_clip_torch": "open_clip", "detectron2": "detectron2"}
# TFLOP/s of dense matrix products, by a part of the GPU's name: bfloat16 and float16, float32 without TF32.
_PEAKS = {"H200": (989, 67), "H100": (989, 67), "A100": (312, 19.5), "L40S": (362, 91.6), "RTX 4090": (165, 82.6)}


def describe(device: torch.device) -> dict[str, str]:
    """Names and versions, by what they are of; all are texts, so that they can be written anywhere."""
    found = {"device": describe_machine(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["driver"] = _driver()
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
    found["CPU cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    found["Python"] = platform.python_version()
    found["torch"] = torch.__version__
    return {**found, **{module: _version(name, module) for name, module in _PACKAGES.items()}}


def peak_tflops(name: str, precision: str) -> float | None:
    """What a maker states for dense matrix products on a GPU, in TFLOP/s; None where it is not known here."""
    for part, (half, single) in _PEAKS.items():
        if part in name:
            return single if precision == "float32" else half
    return None


def _version(name: str, module: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return getattr(importlib.import_module(module), "__version__", "unknown")
    except ImportError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")
