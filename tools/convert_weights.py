#!/usr/bin/env python
"""Convert weights between libraries: `spar-d2 convert`."""

import sys

from spar_d2.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
