"""What stands between the network and the application: each guard is a small piece of pure ASGI.

`guarded` puts them around an application in their order: what needs no body is settled before one is read, and a key is
asked for before memory is given. What happens below a request - heads that never come, clients that do not read,
too many connections - is seen in `connections.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vismem.serving.checks import ApiKeys, Hosts, Origins, WellFormed
from vismem.serving.errors import ApiError, has_body, refuse, stopping

SMALL_BODY = (
    16 * 2**10
)  # bytes; there is room for such ones always, else a few large ones that stall shut all others out
FAREWELL = 1.0  # seconds in which a client takes the last that it is told
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Guards:
    """How an application is guarded.

    Args:
        keys: API keys of which a request must have one; none asks for no key.
        hosts: names that a `Host` header may have (`"*.example.org"` for all below one); None for any. See `hosts_for`.
        origins: web pages' origins that may use the server from a browser, e.g. "https://example.org"; "*" for all.
        max_body: most bytes of a body.
        body_timeout: seconds in which a body must have come.
        together: most bytes of all bodies that are held at once; small ones are taken beyond it.
        parts: most commas in a body: every value of JSON costs the parser far more memory than it has bytes.
        max_headers, max_head: most headers, and most bytes of them.
    """

    keys: Sequence[str] = field(default=(), repr=False)
    hosts: Sequence[str] | None = None
    origins: Sequence[str] = ()
    max_body: int = 32 * 2**20
    body_timeout: float = 30.0
    together: int = 256 * 2**20
    parts: int = 50_000
    max_headers: int = 100
    max_head: int = 16 * 2**10


def guarded(app: ASGIApp, guards: Guards) -> ASGIApp:
    """The application with its guards around it."""
    app = BodyLimit(app, guards.max_body, guards.body_timeout, guards.together, guards.parts)
    if guards.keys:
        app = ApiKeys(app, guards.keys)
    app = WellFormed(app, guards.max_headers, guards.max_head)
    app = Origins(app, guards.origins)
    if guards.hosts is not None:
        app = Hosts(app, guards.hosts)
    if guards.origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(guards.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return SafeHeaders(Ending(app))


class BodyLimit:
    """Reads each body before anything answers it: at most so large, in so much time, and no more of all together.

    The application gets it in one piece. It counts as held until that is done.
    """

    def __init__(
        self, app: ASGIApp, most: int, timeout: float = 30.0, together: int = 256 * 2**20, parts: int = 50_000
    ) -> None:
        self.app, self.most, self.timeout, self.together, self.parts = app, most, timeout, together, parts
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            whole = await self._read(scope, receive, body)
        except ApiError as error:
            self.held -= len(body)
            body.clear()
            await refuse(error, scope, receive, send)
            return
        except BaseException:
            self.held -= len(body)
            raise
        size = len(body)
        content: list[bytes] = [bytes(body)]
        body.clear()

        async def replayed() -> Message:
            return {"type": "http.request", "body": content.pop(), "more_body": False} if content else await receive()

        try:
            if whole:  # else the client has gone
                await self.app(scope, replayed, send)
        finally:
            self.held -= size

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        told = Headers(scope=scope).get("content-length", "0")
        if not told.isdecimal() or len(told) > 20:
            raise ApiError(400, "Content-Length is no number of bytes")
        if int(told) > self.most:
            raise self._too_large()
        with anyio.move_on_after(self.timeout):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                piece, more = message.get("body", b""), message.get("more_body", False)
                if len(body) + len(piece) > self.most:
                    raise self._too_large()
                if self.held + len(piece) > self.together and len(body) + len(piece) > SMALL_BODY:
                    raise ApiError(503, "the server holds as many requests as it can; try again in a moment")
                body += piece
                self.held += len(piece)
            if body.count(b",") > self.parts:
                raise ApiError(
                    413, f"the body has more than {self.parts} commas, which separate values in JSON; send less at once"
                )
            return True
        raise ApiError(408, f"the body did not come within {self.timeout:g} seconds")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.most} bytes, the limit; send fewer or smaller images")


class Ending:
    """Tells those whose requests are cut off, because the server ends, that it does: what is not begun by its status,
    a stream by its last event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun: list[Message] = []

        async def noted(message: Message) -> None:
            if not begun:
                begun.append(message)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            task = asyncio.current_task()
            assert task is not None
            timer = asyncio.get_running_loop().call_later(FAREWELL, task.cancel)  # of a client that does not read
            with contextlib.suppress(asyncio.CancelledError):
                response = stopping().response()
                response.headers["Connection"] = "close"
                if not begun:
                    await response(scope, receive, send)
                elif "text/event-stream" in Headers(raw=begun[0]["headers"]).get("content-type", ""):
                    event = b"data: " + bytes(response.body) + b"\n\n"
                    await send({"type": "http.response.body", "body": event, "more_body": False})
            timer.cancel()


class SafeHeaders:
    """Tells browsers not to guess at, keep, run or frame what is answered. Refuses what is not plain HTTP."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, safe)
