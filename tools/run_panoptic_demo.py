#!/usr/bin/env python
"""Fine-tune PanopticFPN on the toy data set: `python tools/toy/panoptic.py`."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("toy") / "panoptic.py"), run_name="__main__")
