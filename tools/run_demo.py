#!/usr/bin/env python
"""Distill a student on the toy data set: `spar-d2 toy`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["toy", *sys.argv[1:]]))
