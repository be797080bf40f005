#!/usr/bin/env python
"""Draw predictions beside the ground truth: `spar-d2 visualize`."""

from spar_d2.cli.visualize import main

if __name__ == "__main__":
    main()
