"""What every request passes: key, size, time to arrive; and what is counted of it."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockdiff.serving.errors import Refused
from blockdiff.serving.limits import Limits
from blockdiff.serving.metrics import Metrics

OPEN = ("/", "/health", "/ready")  # without a key
# Seconds in which what a refused client still sends is thrown away.
LINGER = 5.0


class Gate:
    """The outermost part of the app: reads the body within its bounds before anything else."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            scope["blockdiff.begin"] = begin
            self._admit(scope)
            body = await self._body(scope, receive)
            if body is None:
                return
            rest = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return rest.pop() if rest else await receive()

            await self.app(scope, replay, noted)
        except Refused as error:
            await _unread(error, scope, receive, noted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status or 499)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - begin)

    def _admit(self, scope: Scope) -> None:
        key = self.limits.api_key
        if key is None or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return
        said = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(said, b"Bearer " + key.encode()):
            raise Refused(401, "the API key is wrong or missing: send `Authorization: Bearer KEY`",
                          code="invalid_api_key")  # fmt: skip

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        most = self.limits.body_bytes
        large = Refused(413, f"the body is larger than {most} bytes", code="body_too_large")
        said: Any = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > most:
            raise large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, "the body took too long to arrive", code="timeout") from None


async def _unread(error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request whose body was not read to its end, and closes the connection.

    Not at once: a client that is still sending would hear of a connection reset, not of the answer.
    """

    async def begun(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "more_body": True}
        await send(message)

    response = error.response
    response.headers["Connection"] = "close"
    await response(scope, receive, begun)
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})
