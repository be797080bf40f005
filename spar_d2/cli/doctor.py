"""Print versions, devices and folders, and the install commands of missing dependencies."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path

import spar_d2
from spar_d2.utils.environment import cache_root, cpu_count, datasets_root
from spar_d2.utils.errors import printable, readable_errors

# Module name -> distribution name.
_REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "transformers": "transformers",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "cv2": "opencv-python",
    "PIL": "Pillow",
    "pycocotools": "pycocotools",
    "fvcore": "fvcore",
    "iopath": "iopath",
    "omegaconf": "omegaconf",
}
_OPTIONAL = {
    "triton": ("triton", "faster label prediction on NVIDIA GPUs; included in PyTorch for CUDA"),
    "rasterio": ("rasterio", 'needed for GeoTIFF: pip install "spar_d2[geo]"'),
}
_INSTALL_DETECTRON2 = "spar-d2 install-detectron2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    with readable_errors():
        lines, missing = report()
        width = max(len(name) for name, _ in lines)
        print("\n".join(printable(f"{name:<{width}}  {value}") for name, value in lines))
    if missing:
        print("\nMissing or broken:\n" + "\n".join(f"  {name}: {command}" for name, command in missing.items()))
        raise SystemExit(1)
    print("\nAll required packages are installed and can be imported.")


def report() -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return the names and values to print, and the install command of each missing or broken distribution."""
    lines = [("spar_d2", f"{spar_d2.__version__} in {Path(spar_d2.__file__).parent}")]
    lines.append(("Python", f"{platform.python_version()}, {sys.executable}"))
    lines.append(("system", platform.platform()))
    missing = {}
    for module, distribution in _REQUIRED.items():
        version = _version(module, distribution)
        fault = _fault(module) if version else ""
        lines.append((distribution, f"{version}{fault}" if version else "not installed"))
        if not version:
            missing[distribution] = f"pip install {distribution}"
        elif fault:
            # A release of torchvision belongs to one of torch.
            names = "torch torchvision" if distribution == "torchvision" else distribution
            missing[distribution] = f"pip install --upgrade {names}"
    detectron2 = _version("detectron2", "detectron2")
    fault = _fault("detectron2") if detectron2 else ""
    lines.append(("detectron2", f"{detectron2}{fault or f', {_compiled()}'}" if detectron2 else "not installed"))
    if fault or not detectron2:
        missing["detectron2"] = _INSTALL_DETECTRON2
    for module, (distribution, use) in _OPTIONAL.items():
        version = _version(module, distribution)
        value = f"{version}{_fault(module)}" if version else f"not installed (optional: {use})"
        lines.append((distribution, value))
    if "torch" not in missing:
        lines += _devices()
    return [*lines, *_folders()], missing


def _version(module: str, distribution: str) -> str:
    """Return the version of a distribution, or "" if its module is not installed."""
    if importlib.util.find_spec(module) is None:
        return ""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _fault(module: str) -> str:
    """Return why an installed module cannot be imported, or ""."""
    try:
        importlib.import_module(module)
    except Exception as error:  # packages of other versions, and libraries for another system, raise anything
        return f" cannot be imported: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def _compiled() -> str:
    """Describe whether Detectron2 has its compiled extension."""
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        return "without the compiled extension detectron2._C (not needed by spar_d2, but by some frameworks)"
    return "with the compiled extension detectron2._C"


def _devices() -> list[tuple[str, str]]:
    import torch

    lines = [("CPU", f"{cpu_count()} cores, {torch.get_num_threads()} threads used by PyTorch")]
    if not torch.cuda.is_available():
        return [
            *lines,
            ("GPU", f"none (PyTorch {'for CUDA ' + torch.version.cuda if torch.version.cuda else 'for CPUs'})"),
        ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        lines.append((f"GPU {index}", f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"))
    return lines


def _folders() -> list[tuple[str, str]]:
    datasets = datasets_root().resolve()
    cache = cache_root()
    free = shutil.disk_usage(_existing(cache)).free / 2**30
    note = "" if datasets.is_dir() else " (does not exist; set DETECTRON2_DATASETS to change it)"
    return [
        ("data sets", f"{datasets}{note}"),
        ("cache", f"{cache} ({free:.0f} GiB free; set SPAR_CACHE to change it)"),
    ]


def _existing(path: Path) -> Path:
    """Return the path itself or its nearest existing parent."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


if __name__ == "__main__":
    main()
