"""Connections with a server that does not wait for ever: uvicorn's protocol for HTTP/1.1 with the limits it has not.

What is wrong with a request that has come is for `guards.py`; here is what never becomes one, and what is never read.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import h11
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

from vismem.serving.errors import ApiError

T = TypeVar("T")
LINGER = 1.0  # seconds in which a client that was turned away can read why
SEND_BUFFER = 64 * 2**10  # the kernel's, for each connection: what a client does not read must pile up here
LOOSE_LINE = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
FEW_CHUNKS, SMALL_CHUNK = 1000, 64  # so many chunks may be smaller on average than so many bytes


@dataclass(frozen=True)
class Patience:
    """How long, and for how many.

    Args:
        head: seconds in which a request's head must have come, from the first byte on, or from the connection's start.
        idle: seconds that a connection may wait for its next request.
        write: seconds that a client may read nothing of what it is sent.
        connections: most at once.
        max_head: most bytes of a head that is not complete.
        dropped: told why ("slow_head", "slow_reader", "connections", "bad_http") whenever a connection is ended.
    """

    head: float = 10.0
    idle: float = 15.0
    write: float = 30.0
    connections: int = 512
    max_head: int = 16 * 2**10
    dropped: Callable[[str], None] = lambda reason: None


def uvicorn_settings(patience: Patience) -> dict[str, Any]:
    """Keywords of `uvicorn.Config` for connections of that patience."""
    return {
        "http": type("ImpatientProtocol", (ImpatientProtocol,), {"patience": patience}),
        "h11_max_incomplete_event_size": patience.max_head,
        "timeout_keep_alive": patience.idle,
        "proxy_headers": False,  # nothing here believes what a client says about its address
        "ws": "none",
    }


class _StrictBuffer(ReceiveBuffer):
    """h11's buffer, whose lines end with CR LF alone, and none of which continues the one before it.

    Proxies read such heads, trailers and chunk sizes in other ways than h11, so one request could hide in another.
    """

    by_lines = False

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """See h11."""
        return self._strictly(super().maybe_extract_lines)

    def maybe_extract_next_line(self) -> bytearray | None:
        """See h11."""
        return self._strictly(super().maybe_extract_next_line)

    def _strictly(self, extract: Callable[[], T]) -> T:
        self.by_lines = True
        try:
            return extract()
        finally:
            self.by_lines = False

    def _extract(self, count: int) -> bytearray:
        found = super()._extract(count)
        if self.by_lines and LOOSE_LINE.search(found):
            raise h11.RemoteProtocolError("a line does not end with CR LF, or continues the one before it")
        return found


class _Connection(h11.Connection):
    """h11's reader, with strict lines, which takes no body in crumbs: each costs far more to read than to send."""

    chunks = chunked = 0

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._receive_buffer = _StrictBuffer()

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunked = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self.chunks += 1
            self.chunked += len(event.data)
            if self.chunks > FEW_CHUNKS and self.chunked < SMALL_CHUNK * self.chunks:
                raise h11.RemoteProtocolError("too many small chunks")
        return event


class _Timer:
    """One call in the future, which can be taken back."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self.handle is not None

    def start(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.stop()
        self.handle = self.loop.call_later(seconds, call, *args)

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None


class ImpatientProtocol(H11Protocol):
    """A connection that ends when its client is too slow. `uvicorn_settings` makes one of a given patience."""

    patience = Patience()

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.conn = _Connection(h11.SERVER, self.patience.max_head)
        self.head_timer = _Timer(self.loop)
        self.write_timer = _Timer(self.loop)
        self.turned_away = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        transport.set_write_buffer_limits(high=0)  # tells at once when something could not be sent, and when all was
        if len(self.connections) > self.patience.connections:
            self._turn_away()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self.head_timer.stop()
        self.write_timer.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something has come; before a head is complete its time goes on, whatever comes."""
        if self.turned_away:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_head()

    def handle_events(self) -> None:
        """Reads what has come."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self.head_timer.stop()

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """It has taken everything."""
        self.write_timer.stop()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP."""
        self.head_timer.stop()
        self.patience.dropped("bad_http")
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self._say(ApiError(400, "what was sent is no valid request of HTTP", code="bad_http"))
        self.transport.close()

    def _await_head(self) -> None:
        if not self.head_timer.runs:
            self.head_timer.start(self.patience.head, self._no_head)

    def _no_head(self) -> None:
        self.patience.dropped("slow_head")
        if self.conn.trailing_data[0]:
            self._say(ApiError(408, f"the request's head did not come within {self.patience.head:g} seconds"))
        self.transport.close()

    def _await_reading(self) -> None:
        self.write_timer.start(self.patience.write, self._not_read, self.transport.get_write_buffer_size())

    def _not_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._await_reading()
        else:
            self.patience.dropped("slow_reader")
            self.transport.abort()  # to close would be to wait until it has read the rest

    def _turn_away(self) -> None:
        self.turned_away = True
        self.patience.dropped("connections")
        self._say(ApiError(503, "too many connections; try again in a moment", code="too_many_connections"))
        self.loop.call_later(LINGER, self.transport.abort)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _say(self, error: ApiError) -> None:
        """An error outside of any request that uvicorn knows."""
        response = error.response()
        response.headers["Connection"] = "close"
        head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        line = f"HTTP/1.1 {error.status} \r\n".encode()
        self.transport.write(line + head + b"\r\n" + bytes(response.body))
