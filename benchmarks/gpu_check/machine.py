"""Information about the machine and versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import subprocess

import torch

from benchmarks.measure import describe_machine
from spar_d2.utils.environment import cpu_count

# Distribution names, and modules with a version attribute, in case there is no installed distribution.
_PACKAGES = {"triton": "triton", "timm": "timm", "open_clip_torch": "open_clip", "detectron2": "detectron2"}
# Dense matrix product TFLOP/s by GPU name: bfloat16 and float16, and float32 without TF32.
_PEAKS = {"H200": (989, 67), "H100": (989, 67), "A100": (312, 19.5), "L40S": (362, 91.6), "RTX 4090": (165, 82.6)}


def describe(device: torch.device) -> dict[str, str]:
    """Return hardware names and software versions as strings."""
    info = {"device": describe_machine(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        info["compute capability"] = f"{properties.major}.{properties.minor}"
        info["driver"] = _driver()
        info["CUDA"] = str(torch.version.cuda)
        info["cuDNN"] = str(torch.backends.cudnn.version())
    info["CPU cores"] = str(cpu_count())
    info["Python"] = platform.python_version()
    info["torch"] = torch.__version__
    return {**info, **{module: _version(name, module) for name, module in _PACKAGES.items()}}


def peak_tflops(name: str, precision: str) -> float | None:
    """Return a GPU's specified TFLOP/s of dense matrix products, or None if unknown."""
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
