#!/usr/bin/env python
"""Draw predictions beside the ground truth: `spar-d2 visualize`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["visualize", *sys.argv[1:]]))
