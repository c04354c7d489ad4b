"""The access log: one line per request, without message texts, keys or query strings."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_PATH = 200  # characters of a path that are logged
MAX_QUEUED = 10_000  # lines


class AccessLog:
    """Logs time, method, path, status, seconds, and prompt and completion tokens when a request ends.

    Args:
        app: the guarded application.
        write: called with each line, without its newline.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], None]) -> None:
        self.app, self.write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), "-"  # stays "-" if the client leaves before a response starts

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        finally:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {request_line(scope)} {status}"
            line += f" {time.perf_counter() - start:.3f}s"
            builder = scope.get("state", {}).get("response")
            if builder is not None and builder.prompt_tokens:
                line += f" {builder.prompt_tokens}+{builder.completion_tokens} tokens"
            self.write(line)


def request_line(scope: Scope) -> str:
    """Method and path in printable ASCII, without the query string."""
    raw_path = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogateescape")
    path = ascii(raw_path.partition(b"?")[0].decode("latin-1"))[1:-1]
    path = path[:MAX_PATH] + ("..." if len(path) > MAX_PATH else "")
    return f"{ascii(scope['method'])[1:-1][:16]} {path}"


class LineWriter:
    """Writes lines from its own thread, so that a blocked log file or pipe does not block requests.

    Drops lines while the queue is full.

    Args:
        descriptor: of the open file.
        max_queued: lines that may be queued.
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
        """Waits up to `seconds` for each of: room in the queue, and the last write."""
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
