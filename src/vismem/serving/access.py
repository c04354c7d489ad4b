"""Counts and logs requests: one line each, without message texts, keys or query strings."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from vismem.serving.metrics import Metrics

MAX_PATH = 200  # characters of a path that are logged
MAX_QUEUED = 10_000  # lines


class RequestLog:
    """Counts and logs every request. Goes outside the guards, so that refused requests are included.

    Args:
        app: the guarded application.
        metrics: what to count with.
        write: called with a line when a request ends: time, method, path, status, seconds, counts of tokens.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, write: Callable[[str], None] | None = None) -> None:
        self.app, self.metrics, self.write = app, metrics, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), None  # stays None if the client leaves before a response starts

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self.metrics.in_flight.track_inprogress():
                await self.app(scope, receive, send_and_record)
        finally:
            self.metrics.count_request(scope["method"], scope["path"], status)
            if self.write is not None:
                line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {request_line(scope)} {status or '-'}"
                line += f" {time.perf_counter() - start:.3f}s"
                if (usage := scope.get("state", {}).get("usage")) is not None:
                    line += f" {usage.prompt_tokens}+{usage.completion_tokens} tokens"
                self.write(line)


def request_line(scope: Scope) -> str:
    """Method and path in printable ASCII, without the query string."""
    raw_path = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogateescape")
    path = ascii(raw_path.partition(b"?")[0].decode("latin-1"))[1:-1]
    path = path[:MAX_PATH] + ("..." if len(path) > MAX_PATH else "")
    return f"{ascii(scope['method'])[1:-1][:16]} {path}"


class LineWriter:
    """Writes lines to a file descriptor from its own thread, so that a blocked pipe or disk does not block requests.

    Drops lines while the queue is full.
    """

    def __init__(self, descriptor: int, max_queued: int = MAX_QUEUED) -> None:
        self.descriptor = descriptor
        self.lines: queue.Queue[str | None] = queue.Queue(max_queued)
        self.thread = threading.Thread(target=self._run, name="vismem-access-log", daemon=True)
        self.thread.start()

    def __call__(self, line: str) -> None:
        """Queues a line."""
        with contextlib.suppress(queue.Full):
            self.lines.put_nowait(line)

    def close(self, seconds: float = 1.0) -> None:
        """Waits for room in the queue and for the last write, up to `seconds` each."""
        try:
            self.lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self.thread.join(seconds)

    def _run(self) -> None:
        try:
            while (line := self.lines.get()) is not None:
                rest = line.encode() + b"\n"
                while rest:  # os.write, because a Python file object holds its lock while it blocks
                    rest = rest[os.write(self.descriptor, rest) :]
        except OSError:  # the reader closed the pipe
            return
