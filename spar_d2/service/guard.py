"""Checks of every request before it reaches the application: host, origin, size and time; and security headers."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spar_d2.service.limits import Limits, Refusal

# Names of this machine, by which a browser reaches it. Another name in the header Host is a DNS-rebinding attack.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# A client that still sends its body would not read the response if the connection was closed at once.
_DRAIN_SECONDS = 2
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def refused(refusal: Refusal) -> JSONResponse:
    """Return the response to a request that is refused."""
    return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)


class Guard:
    """ASGI middleware that refuses requests, and adds security headers to responses.

    Args:
        app: application.
        limits: limits of the size and time of request bodies.
        hosts: allowed names in the header Host; None allows all.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Collection[str] | None) -> None:
        self.app, self.limits, self.hosts = app, limits, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Body(receive, headers, self.limits)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                response = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    response.setdefault(name, value)
                if not body.finished:
                    response["Connection"] = "close"
            elif not message.get("more_body") and not body.finished:
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self._check(scope["method"], headers)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, send_guarded)
            return
        await self.app(scope, body.receive, send_guarded)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(f"//{host}") not in self.hosts:
            allowed = ", ".join(sorted(self.hosts))
            raise Refusal(403, f"The service answers to {allowed}, not to {host[:100]!r}; see --allow-host.")
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None:
            same = urlsplit(origin).netloc == host if _name(origin) else False
            if not same and not (self.hosts is not None and _name(origin) in set(self.hosts) - set(LOOPBACK)):
                raise Refusal(403, f"Requests of other websites are refused, got one of {origin[:100]!r}.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.limits.max_bytes:
            raise _too_large(self.limits)


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"The request must have at most {limits.max_bytes:,} bytes; use a smaller or compressed image.")


class _Body:
    """Body of a request, which is refused as soon as it is too large or too slow.

    Attributes:
        finished: whether nothing is left to read.
    """

    def __init__(self, receive: Receive, headers: Headers, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes, self._deadline, self._drain_seconds = 0, anyio.current_time() + limits.body_seconds, _DRAIN_SECONDS
        self.finished = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

    async def receive(self) -> Message:
        if self.finished:
            return await self._receive()
        with anyio.move_on_after(self._deadline - anyio.current_time()):
            message = await self._next()
            self._bytes += len(message.get("body", b""))
            if self._bytes > self._limits.max_bytes:
                raise _too_large(self._limits)
            return message
        self._drain_seconds = 0
        raise Refusal(408, f"The request was not received within {self._limits.body_seconds:g} seconds.")

    async def drain(self) -> None:
        """Read and drop the rest of the body for a short time."""
        with anyio.move_on_after(self._drain_seconds):
            while not self.finished:
                await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self.finished = not message.get("more_body")
        return message
