"""The access log: one line for each request, without texts, keys and query strings."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LONGEST_PATH = 200  # characters of a path that are logged
MOST_LINES = 10_000  # that may wait to be written


class AccessLog:
    """Writes a line when a request is over: time, method, path, status, seconds, and tokens of prompt and answer.

    Args:
        app: the guarded application.
        write: takes each line, without its end.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], None]) -> None:
        self.app, self.write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), "-"  # of those who leave before they are answered

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {request_line(scope)} {status}"
            line += f" {time.perf_counter() - begin:.3f}s"
            assembly = scope.get("state", {}).get("assembly")
            if assembly is not None and assembly.prompt_tokens:
                line += f" {assembly.prompt_tokens}+{assembly.completion_tokens} tokens"
            self.write(line)


def request_line(scope: Scope) -> str:
    """Method and path of a request in printable ASCII, without the query."""
    path = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogateescape")
    shown = ascii(path.partition(b"?")[0].decode("latin-1"))[1:-1]
    cut = shown[:LONGEST_PATH] + ("..." if len(shown) > LONGEST_PATH else "")
    return f"{ascii(scope['method'])[1:-1][:16]} {cut}"


class LineWriter:
    """Writes lines in a thread of its own, so that a log which nobody reads keeps nobody waiting.

    Lines are dropped where too many wait.

    Args:
        descriptor: of the file.
        most: lines that may wait.
    """

    def __init__(self, descriptor: int, most: int = MOST_LINES) -> None:
        self.descriptor = descriptor
        self.lines: queue.Queue[str | None] = queue.Queue(most)
        self.thread = threading.Thread(target=self._run, name="vismem-access-log", daemon=True)
        self.thread.start()

    def __call__(self, line: str) -> None:
        """Writes a line, soon."""
        with contextlib.suppress(queue.Full):
            self.lines.put_nowait(line)

    def close(self, seconds: float = 1.0) -> None:
        """Waits at most that long until all is written."""
        try:
            self.lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self.thread.join(seconds)

    def _run(self) -> None:
        try:
            while (line := self.lines.get()) is not None:
                rest = line.encode() + b"\n"
                while rest:  # the system's own call: a lock of Python's files would be held while it waits
                    rest = rest[os.write(self.descriptor, rest) :]
        except OSError:  # whoever read it has gone
            return
