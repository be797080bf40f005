#!/usr/bin/env python
"""Prepare the labels of data sets: `spar-d2 prepare`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
