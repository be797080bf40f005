#!/usr/bin/env python
"""Install Detectron2 into the running Python: `spar-d2 install-detectron2`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["install-detectron2", *sys.argv[1:]]))
