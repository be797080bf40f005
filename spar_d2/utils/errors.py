"""What a user sees of an error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator

# Set to see where an error came from instead of its message alone.
TRACEBACK_VARIABLE = "SPAR_TRACEBACK"
# Of Unicode: control characters, halves of pairs, and those that turn the direction of text around.
_COMMANDS = ("Cc", "Cs")
_TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_BY_USERS = (ValueError, OSError, RuntimeError, FloatingPointError)


def printable(text: str) -> str:
    """A text without characters that command a terminal; names of files and classes of others may hold some.

    They are shown as Python writes them ("\\x1b"); line ends and tabs stay.
    """
    return "".join(repr(char)[1:-1] if _commands(char) else char for char in text)


def _commands(char: str) -> bool:
    return char not in "\n\t" and (unicodedata.category(char) in _COMMANDS or char in _TURNS)


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


def make_logs_printable(*loggers: logging.Logger) -> None:
    """Make all that these loggers write :func:`printable`, and what is written where no logger was set up."""
    for handler in (logging.lastResort, *(handler for logger in loggers for handler in logger.handlers)):
        if handler and not any(isinstance(one, _Printable) for one in handler.filters):
            handler.addFilter(_Printable())


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
        print(f"error: {printable(str(error))}\n({TRACEBACK_VARIABLE}=1 shows where it came from)", file=sys.stderr)
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
