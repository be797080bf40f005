"""User-facing error messages."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator

# Environment variable that shows full tracebacks.
TRACEBACK_VARIABLE = "SPAR_TRACEBACK"
# Unicode categories of control characters and surrogates, and characters that change the text direction.
_CONTROL_CATEGORIES = ("Cc", "Cs")
_BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_USER_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError)


def printable(text: str) -> str:
    """Escape control characters, except newlines and tabs, as Python does ("\\x1b").

    File and class names from untrusted sources could otherwise control the terminal.
    """
    return "".join(repr(char)[1:-1] if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return char not in "\n\t" and (unicodedata.category(char) in _CONTROL_CATEGORIES or char in _BIDI_CONTROLS)


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


def make_logs_printable(*loggers: logging.Logger) -> None:
    """Apply :func:`printable` to the messages of these loggers, and of loggers without handlers."""
    for handler in (logging.lastResort, *(handler for logger in loggers for handler in logger.handlers)):
        if handler and not any(isinstance(filter_, _Printable) for filter_ in handler.filters):
            handler.addFilter(_Printable())


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Context manager that prints errors caused by the user in one line on stderr, and exits with code 1.

    With the environment variable SPAR_TRACEBACK, errors are raised with their traceback.
    """
    try:
        yield
    except _USER_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(
            f"error: {printable(_without_worker(error))}\n(set {TRACEBACK_VARIABLE}=1 to show the traceback)",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _without_worker(error: BaseException) -> str:
    """Return the message of an error, without the traceback that PyTorch adds if it was raised in a worker process."""
    text = str(error)
    if not text.startswith(f"Caught {type(error).__name__} in "):
        return text
    return text.rpartition(f"\n{type(error).__name__}: ")[2].strip()


@contextlib.contextmanager
def short_tracebacks(name: str) -> Iterator[None]:
    """Context manager that removes tracebacks of user errors from the log; see :func:`readable_errors`.

    Args:
        name: name of the logger.
    """

    def shorten(record: logging.LogRecord) -> bool:
        if not os.environ.get(TRACEBACK_VARIABLE) and record.exc_info and isinstance(record.exc_info[1], _USER_ERRORS):
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
