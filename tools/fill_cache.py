#!/usr/bin/env python
"""Compute teacher targets before training: `spar-d2 cache-teacher`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["cache-teacher", *sys.argv[1:]]))
