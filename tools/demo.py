#!/usr/bin/env python
"""Segment images and videos: `spar-d2 segment`."""

from spar_d2.cli.segment import main

if __name__ == "__main__":
    main()
