#!/usr/bin/env python
"""Distill, train and evaluate: `spar-d2 train`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
