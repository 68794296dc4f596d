"""Connections that end: uvicorn's own wait for a head, and for a client that reads, for ever."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from blockdiff.serving.errors import Refused


class Wire(H11Protocol):
    """One connection.

    By h11, whatever else is installed: it takes heads of 64 KiB at most, where httptools has no
    bound. `head_seconds`: to send a head. `read_seconds`: without reading anything of what waits.
    """

    head_seconds, read_seconds = 30.0, 30.0
    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def _time_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            if self._head is not None:
                self._head.cancel()
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so as every other error is, where nothing was answered yet."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        answer = Refused(400, "this is no HTTP request", code="invalid_http").response
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # What still waits for its reader may be too little for the writing to be paused.
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.read_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reader is None:
            self._reader = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader is not None:
            self._reader.cancel()
        self._reader = None
