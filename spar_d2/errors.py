"""What a user sees of an error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

# Set to see where an error came from instead of its message alone.
TRACEBACK_VARIABLE = "SPAR_TRACEBACK"
_BY_USERS = (ValueError, OSError, RuntimeError, FloatingPointError)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit code 1.

    With the environment variable SPAR_TRACEBACK the error is left as it is, to see where it came from.
    """
    try:
        yield
    except _BY_USERS as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {error}\n({TRACEBACK_VARIABLE}=1 shows where it came from)", file=sys.stderr)
        raise SystemExit(1) from None


@contextlib.contextmanager
def short_tracebacks(name: str) -> Iterator[None]:
    """Within it, a logger of that name logs errors without where they came from; see :func:`readable_errors`."""

    def shorten(record: logging.LogRecord) -> bool:
        if not os.environ.get(TRACEBACK_VARIABLE) and record.exc_info and isinstance(record.exc_info[1], _BY_USERS):
            record.exc_info = record.exc_text = None
            record.msg = f"{record.getMessage().rstrip(':')}, see the message at the end"
            record.args = ()
        return True

    logger = logging.getLogger(name)
    logger.addFilter(shorten)
    try:
        yield
    finally:
        logger.removeFilter(shorten)
