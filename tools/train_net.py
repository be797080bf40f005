#!/usr/bin/env python
"""Distill, train and evaluate: `spar-d2 train`."""

from spar_d2.cli.train import main

if __name__ == "__main__":
    main()
