"""Settings of the HTTP server, and the time in which it must receive the head of a request."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from spar_d2.service.limits import Limits

# Connections beyond it are refused before anything is read.
_MOST_CONNECTIONS = 1000


def server_config(app: Any, limits: Limits, **options: Any) -> uvicorn.Config:
    """Return the settings of a server.

    Args:
        app: application.
        limits: limits of requests.
        **options: other settings of uvicorn.
    """
    protocol: Any = functools.partial(_TimedHeads, limits.head_seconds)
    return uvicorn.Config(app, http=protocol, server_header=False, limit_concurrency=_MOST_CONNECTIONS, **options)


class _TimedHeads(H11Protocol):
    """Closes connections that do not send the head of a request in time; uvicorn waits for it without end.

    Args:
        seconds: time for the head.
        *args, **kwargs: arguments of uvicorn.
    """

    def __init__(self, seconds: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the timer while no request is handled, and stop it when there is one."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
