#!/usr/bin/env python
"""Compare linear probes: `spar-d2 probe`."""

from spar_d2.cli.probe import main

if __name__ == "__main__":
    main()
