"""uvicorn's HTTP/1.1 protocol, plus the timeouts and limits it lacks.

Complete requests are checked in `guards.py`; this module deals with clients that never finish a request or never read
a response.

This builds on uvicorn's `H11Protocol` and h11's receive buffer, neither of which is a public interface: tested with
uvicorn 0.54.0 and h11 0.16.0.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import h11
from h11._receivebuffer import ReceiveBuffer  # h11 0.16.0: lines are split here and nowhere else
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol  # uvicorn 0.54.0: it has no other hook per connection

from vismem.serving.errors import ApiError

T = TypeVar("T")
LINGER = 1.0  # seconds that a rejected client has to read why
SEND_BUFFER = 64 * 2**10  # bytes of the kernel's buffer per connection; small, so that unread data shows up here
LOOSE_LINE = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
FREE_CHUNKS, MIN_CHUNK = 1000, 64  # past so many chunks, they must average so many bytes


@dataclass(frozen=True)
class ConnectionLimits:
    """Timeouts in seconds, and limits.

    Args:
        head: for a request's headers to arrive, from the first byte or the start of the connection.
        idle: that a connection may wait for its next request.
        write: that a client may go without reading any of its response.
        connections: open at the same time.
        max_head: bytes of incomplete headers.
        on_drop: called with the reason ("slow_head", "slow_reader", "connections", "bad_http") for each dropped
            connection.
    """

    head: float = 10.0
    idle: float = 15.0
    write: float = 30.0
    connections: int = 512
    max_head: int = 16 * 2**10
    on_drop: Callable[[str], None] = lambda _reason: None


def uvicorn_settings(limits: ConnectionLimits) -> dict[str, Any]:
    """Keywords of `uvicorn.Config` that enforce these limits."""
    return {
        "http": type("LimitedProtocol", (LimitedProtocol,), {"limits": limits}),
        "h11_max_incomplete_event_size": limits.max_head,
        "timeout_keep_alive": limits.idle,
        "proxy_headers": False,  # clients can forge them
        "ws": "none",
    }


class _StrictBuffer(ReceiveBuffer):
    """h11's buffer, but lines must end in CR LF and cannot be folded.

    Proxies parse such headers, trailers and chunk sizes differently from h11, which allows request smuggling.
    """

    by_lines = False

    @override
    def maybe_extract_lines(self) -> list[bytearray] | None:
        return self._strictly(super().maybe_extract_lines)

    @override
    def maybe_extract_next_line(self) -> bytearray | None:
        return self._strictly(super().maybe_extract_next_line)

    def _strictly(self, extract: Callable[[], T]) -> T:
        self.by_lines = True
        try:
            return extract()
        finally:
            self.by_lines = False

    @override
    def _extract(self, count: int) -> bytearray:
        extracted = super()._extract(count)
        if self.by_lines and LOOSE_LINE.search(extracted):
            raise h11.RemoteProtocolError("a line does not end in CR LF, or is folded")
        return extracted


class _Connection(h11.Connection):
    """h11's parser with strict lines; refuses bodies in tiny chunks, which cost far more to read than to send."""

    chunks = chunk_bytes = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_buffer = _StrictBuffer()

    @override
    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunk_bytes = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self.chunks += 1
            self.chunk_bytes += len(event.data)
            if self.chunks > FREE_CHUNKS and self.chunk_bytes < MIN_CHUNK * self.chunks:
                raise h11.RemoteProtocolError("too many small chunks")
        return event


class _Timer:
    """A delayed call that can be cancelled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.stop()
        self.handle = self.loop.call_later(seconds, call, *args)

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None


class LimitedProtocol(H11Protocol):
    """A connection that is dropped when its client is too slow. `uvicorn_settings` sets the limits."""

    limits = ConnectionLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Connection(h11.SERVER, self.limits.max_head)
        self.head_timer = _Timer(self.loop)
        self.write_timer = _Timer(self.loop)
        self.rejected = False

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        transport.set_write_buffer_limits(high=0)  # pause as soon as anything is unsent, resume when all is sent
        if len(self.connections) > self.limits.connections:
            self._reject()
        else:
            self._await_head()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.head_timer.stop()
        self.write_timer.stop()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        """Feeds the parser. Data that does not complete the headers does not restart their timer."""
        if self.rejected:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_head()

    @override
    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self.head_timer.stop()

    @override
    def pause_writing(self) -> None:
        """Starts the write timer: the client is not reading."""
        super().pause_writing()
        self._await_reader()

    @override
    def resume_writing(self) -> None:
        self.write_timer.stop()
        super().resume_writing()

    @override
    def send_400_response(self, msg: str) -> None:
        """Answers something that is not HTTP, without h11's message."""
        self.head_timer.stop()
        self.limits.on_drop("bad_http")
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self._send_error(ApiError(400, "this is not a valid HTTP request", code="bad_http"))
        self.transport.close()

    def _await_head(self) -> None:
        if self.head_timer.handle is None:
            self.head_timer.start(self.limits.head, self._drop_slow_head)

    def _drop_slow_head(self) -> None:
        self.limits.on_drop("slow_head")
        if self.conn.trailing_data[0]:
            self._send_error(ApiError(408, f"the headers did not arrive within {self.limits.head:g} seconds"))
        self.transport.close()

    def _await_reader(self) -> None:
        self.write_timer.start(self.limits.write, self._drop_slow_reader, self.transport.get_write_buffer_size())

    def _drop_slow_reader(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() < unsent:
            self._await_reader()
        else:
            self.limits.on_drop("slow_reader")
            self.transport.abort()  # close() would wait for the rest to be read

    def _reject(self) -> None:
        self.rejected = True
        self.limits.on_drop("connections")
        self._send_error(ApiError(503, "too many connections; try again in a moment", code="too_many_connections"))
        self.loop.call_later(LINGER, self.transport.abort)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _send_error(self, error: ApiError) -> None:
        """Writes an error that belongs to no request uvicorn knows."""
        response = error.response()
        response.headers["Connection"] = "close"
        head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        line = f"HTTP/1.1 {error.status} \r\n".encode()
        self.transport.write(line + head + b"\r\n" + bytes(response.body))
