"""Measure speed and memory (``python -m benchmarks``); requires a clone of the repository."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import spar_d2

_CLONE = Path(spar_d2.__file__).resolve().parents[1]


def main() -> None:
    if not (_CLONE / "benchmarks" / "__main__.py").is_file():
        raise SystemExit("error: spar-d2 benchmark needs a clone of the repository, installed with pip install -e .")
    sys.path.insert(0, str(_CLONE))
    importlib.import_module("benchmarks.__main__").main()
