"""What every HTTP request passes: its number, the token, limits of size and time; and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from detkit.serve.observe import Metrics, log
from detkit.serve.settings import Problem, Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# What tells nothing, and what a browser or a cluster asks for before it has a token.
OPEN = {"/", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/openapi.json"}
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_SECURE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def authorised(header: str | bytes | None, settings: Settings) -> bool:
    """Whether an `Authorization` header has the token, where one is asked for."""
    if settings.token is None:
        return True
    given = header.encode("latin-1", "replace") if isinstance(header, str) else header or b""
    return hmac.compare_digest(given, b"Bearer " + settings.token.get_secret_value().encode())


def problem(error: Problem) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of the answer that tells a Problem."""
    headers = [(b"content-type", b"application/json")]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    body = json.dumps({"error": error.reason}).encode()
    return error.status, [*headers, (b"content-length", str(len(body)).encode())], body


class Gate:
    """ASGI middleware around the app. A request's handler may add to `scope["log"]` what is to be in its line."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.held = 0  # bytes of all requests in work

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = _Call(self, scope, receive, send)
        try:
            call.check()
            await self.app(scope, call.receive, call.send)
        except Problem as error:
            if call.status:
                raise
            scope["log"]["reason"] = error.reason
            status, headers, body = problem(error)
            await call.send({"type": "http.response.start", "status": status, "headers": headers})
            await call.send({"type": "http.response.body", "body": body})
        finally:
            call.end()


class _Call:
    """A request on its way through the gate."""

    def __init__(self, gate: Gate, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self._gate, self._scope, self._receive, self._send = gate, scope, receive, send
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self._headers.get(b"x-request-id", b"")
        self._id = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
        self._start = time.perf_counter()
        self._until: float | None = asyncio.get_running_loop().time() + gate.settings.timeout
        self._held = self.status = 0
        scope["log"] = {}
        gate.metrics.open.inc()

    def check(self) -> None:
        """Raise Problem where the head alone says that this is not to be."""
        settings = self._gate.settings
        if self._scope["path"] not in OPEN and not authorised(self._headers.get(b"authorization"), settings):
            raise Problem(401, "a token is needed: Authorization: Bearer TOKEN")
        length = self._headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > settings.max_bytes:
            raise self._too_large()
        if self._headers.get(b"content-encoding", b"identity") != b"identity":
            raise Problem(415, "compressed requests are not taken; photos are compressed as they are")

    async def receive(self) -> Message:
        """The next part of the body. Raises Problem where it takes too long or is too much."""
        settings = self._gate.settings
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise Problem(408, f"the request did not arrive within {settings.timeout:g} s") from None
        size = len(message.get("body", b""))
        self._held += size
        self._gate.held += size
        self._gate.metrics.held.inc(size)
        if self._held > settings.max_bytes:
            raise self._too_large()
        if self._gate.held > settings.max_memory:
            raise Problem(429, "the server holds as many bytes of requests as it may; try again", 1)
        if not message.get("more_body"):
            self._until = None
        return message

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *_SECURE, (b"x-request-id", self._id)]
        await self._send(message)

    def end(self) -> None:
        """Let go of what it held, count it, and log it."""
        gate, route = self._gate, getattr(self._scope.get("route"), "path", "other")
        gate.held -= self._held
        gate.metrics.held.dec(self._held)
        gate.metrics.open.dec()
        seconds = time.perf_counter() - self._start
        gate.metrics.requests.labels("http", route, str(self.status)).inc()
        gate.metrics.seconds.labels("http", route).observe(seconds)
        level = logging.DEBUG if route in OPEN else logging.ERROR if self.status >= 500 else logging.INFO
        line = {"id": self._id.decode(), "method": self._scope["method"], "route": route, "status": self.status}
        log(level, "request", **line, ms=round(1000 * seconds, 1), bytes=self._held, **self._scope["log"])

    def _too_large(self) -> Problem:
        return Problem(413, f"more than {self._gate.settings.max_bytes / 2**20:g} MiB in one request")
