"""uvicorn's HTTP protocol, with limits on the head of a request and deadlines for slow and silent peers.

It knows nothing of routes or models. The deadline for the body of a request is in `guard.py`, which reads it.
"""

import asyncio
import json
import socket
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from qwen_vllm.protocol import ChatError

SEND_BUFFER = 2**17
"""Bytes that the system holds for a reader that lags: more would hide for long that it has stopped."""

LAST_CALL = 0.5
"""Seconds for the request of a connection that was made just before the server ended."""


class Limits(NamedTuple):
    """What a connection may do.

    `header_timeout`: seconds in which the head of a request must have come. `write_timeout`: seconds after which a
    client that takes nothing is cut off. `head_size` is in bytes.
    """

    header_timeout: float
    write_timeout: float
    head_size: int
    header_count: int


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection with its `limits`; uvicorn gives all other arguments."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = self._refused = False
        self._head_size = 0
        self._refusal = ChatError("this is no HTTP request")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline for the head of the first request."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection.family != socket.AF_UNIX:
            # The system resets a connection whose peer takes nothing, or is gone, for so many milliseconds.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.write_timeout * 1000))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadline with the connection."""
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Refuse a head that comes in many pieces before it has filled the memory."""
        if self._refused:
            return
        super().data_received(data)
        if self._in_head and not self._refused:
            self._head_size += len(data)
            if self._head_size > self._limits.head_size:
                self._refusal = self._too_large()
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """Start the deadline for the head at the first byte of a request."""
        super().on_message_begin()
        self._in_head, self._head_size = True, 0
        self._set_deadline()

    def on_headers_complete(self) -> None:
        """Refuse a head that is too large; what is raised here makes the parser call `send_400_response`."""
        self._in_head = False
        self._cancel_deadline()
        if len(self.headers) > self._limits.header_count:
            self._refusal = ChatError(f"more than {self._limits.header_count} headers", status=431)
            raise self._refusal
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self._limits.head_size:
            self._refusal = self._too_large()
            raise self._refusal
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """If we answer before the whole body has arrived, give the client `header_timeout` seconds to send the rest."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._set_deadline()

    def shutdown(self) -> None:
        """End with the server; a new connection, whose request may be on its way, still has a moment."""
        if self.cycle is None:
            self.loop.call_later(LAST_CALL, super().shutdown)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read as a request in the server's shape of errors, and end the connection."""
        body = json.dumps(self._refusal.as_dict()).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[self._refusal.status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # Not closed at once: what is still on its way would make the system drop the answer.
        self._refused = True
        self._set_deadline()

    def _too_large(self) -> ChatError:
        return ChatError(f"the head of the request is over the limit of {self._limits.head_size} bytes", status=431)

    def _set_deadline(self) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(self._limits.header_timeout, self.transport.close)

    def _cancel_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None
