#!/usr/bin/env python
"""Compare inference modes on the benchmarks: `spar-d2 evaluate`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
