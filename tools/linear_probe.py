#!/usr/bin/env python
"""Compare linear probes: `spar-d2 probe`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
