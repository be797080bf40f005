#!/usr/bin/env python
"""Distill a student on the toy data set: `spar-d2 toy`."""

from spar_d2.cli.toy import main

if __name__ == "__main__":
    main()
