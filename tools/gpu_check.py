#!/usr/bin/env python
"""Check on a GPU that everything computes what it computes on a CPU, and measure how fast it is there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_check.run import main  # noqa: E402

if __name__ == "__main__":
    main()
