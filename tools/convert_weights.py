#!/usr/bin/env python
"""Convert weights between libraries: `spar-d2 convert`."""

from spar_d2.cli.convert import main

if __name__ == "__main__":
    main()
