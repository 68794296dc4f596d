"""Connections that end: uvicorn's own wait for a head, and for a client that reads, for ever."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from blockdiff.serving.errors import Refused


class Wire(HttpToolsProtocol):
    """One connection.

    `head_seconds`: to send a head of at most `head_bytes`. `read_seconds`: without reading anything
    of what waits.
    """

    head_bytes, head_seconds, read_seconds = 2**16, 30.0, 30.0
    _head: asyncio.TimerHandle | None = None  # while one is awaited
    _reader: asyncio.TimerHandle | None = None
    _seen = _fields = 0  # bytes of a head that has not ended, and of its fields

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        awaited = self._head
        super().data_received(data)
        if awaited is not None and self._head is awaited:
            self._seen += len(data)
            if self._seen > self.head_bytes and not self.transport.is_closing():
                self.send_400_response("")

    def _await_head(self) -> None:
        self._seen = self._fields = 0
        if self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += len(name) + len(value)
        if self._fields > self.head_bytes:
            raise ValueError("the head is too large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so as every other error is, where no answer has begun."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()
            return
        answer = Refused(400, "this is no HTTP request", code="invalid_http").response
        fields = [*answer.raw_headers, (b"connection", b"close")]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + bytes(answer.body))
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
