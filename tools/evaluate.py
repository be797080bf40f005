#!/usr/bin/env python
"""Compare inference modes on the benchmarks: `spar-d2 evaluate`."""

from spar_d2.cli.evaluate import main

if __name__ == "__main__":
    main()
