"""What a user sees of an error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

# Set to see where an error came from instead of its message alone.
TRACEBACK_VARIABLE = "SPAR_TRACEBACK"


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit code 1.

    With the environment variable SPAR_TRACEBACK the error is left as it is, to see where it came from.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {error}\n({TRACEBACK_VARIABLE}=1 shows where it came from)", file=sys.stderr)
        raise SystemExit(1) from None
