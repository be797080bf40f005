"""Settings of the environment: processors and default folders."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def datasets_root(root: str | os.PathLike | None = None) -> Path:
    """Return the root folder of all data sets: ``root``, ``$DETECTRON2_DATASETS``, or "datasets"."""
    return Path(root or os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def cache_root() -> Path:
    """Return the folder of caches between runs: ``$SPAR_CACHE`` or ``~/.cache/spar_d2``."""
    return Path(os.environ.get("SPAR_CACHE") or "~/.cache/spar_d2").expanduser()
