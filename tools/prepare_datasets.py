#!/usr/bin/env python
"""Prepare the labels of data sets: `spar-d2 prepare`."""

from spar_d2.cli.prepare import main

if __name__ == "__main__":
    main()
