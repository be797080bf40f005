#!/usr/bin/env python
"""Check an own data set: `spar-d2 check-data`."""

from spar_d2.cli.check_data import main

if __name__ == "__main__":
    raise SystemExit(main())
