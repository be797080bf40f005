"""Helpers for error messages about weights."""

from __future__ import annotations

KEY = "MODEL.SPAR.PRETRAINED"
_LONGEST_LINE = 200


def first_line(error: Exception) -> str:
    """Return the first line of an error message, truncated, or the error type if the message is empty."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."
