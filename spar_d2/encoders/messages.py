"""What is said of settings and errors around weights."""

from __future__ import annotations

KEY = "MODEL.SPAR.PRETRAINED"
_LONGEST_LINE = 200


def first_line(error: Exception) -> str:
    """What an error says, in a line that is not too long; its kind where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."
