#!/usr/bin/env python
"""Compute teacher targets before training: `spar-d2 cache-teacher`."""

from spar_d2.cli.cache_teacher import main

if __name__ == "__main__":
    main()
