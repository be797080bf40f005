#!/usr/bin/env python
"""Segment images and videos: `spar-d2 segment`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
