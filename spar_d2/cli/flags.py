"""Flags that several commands share."""

from __future__ import annotations

import argparse
import os


def add_opts(parser: argparse.ArgumentParser, example: str = "") -> None:
    """Add ``--opts KEY VALUE ...``, which takes all remaining words.

    Args:
        parser: parser of the command.
        example: "such as ..." for the help text.
    """
    keys = ", ".join(filter(None, ["config keys to override", example]))
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help=f"{keys}; must be the last flag"
    )


def output_override(folder: str | os.PathLike) -> list[str]:
    """Return the config override of the output folder."""
    # Quoted, because yacs would parse a folder named "2024" as a number.
    return ["OUTPUT_DIR", repr(str(folder))]
