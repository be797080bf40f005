#!/usr/bin/env python
"""Check an own data set: `spar-d2 check-data`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))
