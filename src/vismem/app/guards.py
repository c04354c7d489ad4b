"""ASGI middleware around the viewer, as in `serving/guards.py`.

Gradio serves much that this page does not use: its own API, recordings, a history of runs that may be sent to a hub in
the owner's name. The guards let through only what the page uses, limit its size, and decide who may connect.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import os
import re
from pathlib import Path

from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vismem.serving.access import request_line
from vismem.serving.errors import ApiError, refuse
from vismem.serving.guards import BodyLimit, Check, Hosts, Origins, digest, hosts_for

log = logging.getLogger(__name__)
UPLOAD = "/gradio_api/upload"
ALLOWED_PATHS = re.compile(  # the page, its assets and exports, and the parts of gradio's API that the page calls
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(?:assets|static|svelte|export)/.+"
    r"|/gradio_api/(?:queue/(?:join|data)|upload|upload_progress|heartbeat/[^/]+|file=.+|cancel|reset|info|app_id"
    r"|startup-events)/?"
)
MAX_BODY, MAX_COMMAS = 2**20, 100_000  # bytes of a request that is not an upload, and commas in it
MAX_UPLOAD, MAX_STORED_UPLOADS = 256 * 2**20, 4 * 2**30  # bytes per upload, and of all stored uploads
FORWARDING_HEADERS = (b"x-forwarded-", b"x-gradio-server")  # prefixes
SOURCES = "'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # gradio's scripts are inline and call `eval`
HEADERS = {
    "Content-Security-Policy": f"default-src {SOURCES}; frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def guarded(app: ASGIApp, address: str, password: str | None = None) -> ASGIApp:
    """Wraps the page in its guards.

    Args:
        app: the page.
        address: where it listens. On loopback it answers to loopback host names only.
        password: visitors must know it; None asks for none.
    """
    hosts = hosts_for(address)
    app = PathCheck(SizeLimits(ErrorBoundary(app)))
    if password is not None:
        app = PasswordCheck(app, password)
    app = OriginCheck(app)
    return SafeHeaders(app if hosts is None else HostCheck(app, hosts))


class HostCheck(Hosts):
    """Refuses a `Host` header that does not name this machine."""

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Hosts`."""
        return ApiError(403, "the viewer does not serve that host name") if super().wrong(scope, headers) else None


class OriginCheck(Origins):
    """Refuses requests that a page of another origin makes the browser send."""

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Origins`."""
        return ApiError(403, "the viewer refuses other origins") if super().wrong(scope, headers) else None


class PasswordCheck(Check):
    """HTTP Basic authentication with one password and any user name."""

    def __init__(self, app: ASGIApp, password: str) -> None:
        super().__init__(app)
        self.digest = digest(password.encode())

    def wrong(self, _scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        given = headers.getlist("authorization")
        scheme, _, encoded = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        try:
            password = base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
        except ValueError:
            password = b""
        if hmac.compare_digest(digest(password), self.digest) and scheme.lower() == "basic":
            return None
        challenge = {"WWW-Authenticate": 'Basic realm="VisMem", charset="UTF-8"'}
        return ApiError(401, "the viewer needs a password; any user name works", headers=challenge)


class PathCheck(Check):
    """Refuses paths that the page does not use."""

    def wrong(self, scope: Scope, _headers: Headers) -> ApiError | None:
        """See `Check`."""
        return None if ALLOWED_PATHS.fullmatch(scope["path"]) else ApiError(404, "the viewer has no such page")


class SizeLimits:
    """Limits uploads by their Content-Length, and all other requests by the bytes that arrive."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.limited = app, BodyLimit(app, MAX_BODY, max_held=64 * 2**20, max_commas=MAX_COMMAS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != UPLOAD:
            await self.limited(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdecimal() or len(length) > 20:
            error = ApiError(411, "an upload needs a Content-Length header")
        elif int(length) > MAX_UPLOAD:
            error = ApiError(413, f"an upload may have {MAX_UPLOAD >> 20} MiB at most; upload fewer files at once")
        elif await asyncio.to_thread(stored_bytes) + int(length) > MAX_STORED_UPLOADS:
            error = ApiError(503, "the viewer's upload storage is full; files are deleted after an hour")
        else:
            await self.app(scope, receive, send)
            return
        await refuse(error, scope, receive, send)


def stored_bytes() -> int:
    """Size of all uploads on disk."""
    total = 0
    for folder, _, names in os.walk(get_upload_folder()):
        for name in names:
            with contextlib.suppress(OSError):  # deleted meanwhile
                total += (Path(folder) / name).stat().st_size
    return total


class ErrorBoundary:
    """Logs a failed request in one line, and answers it with status 500 if no answer has started.

    Gradio raises on many malformed requests, and each traceback would fill the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def tracking_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, tracking_send)
        except Exception as error:
            debugging = log.isEnabledFor(logging.DEBUG)
            log.error("the viewer failed at %s: %s", request_line(scope), ascii_line(error), exc_info=debugging)
            if not started:
                answer = ApiError(500, "internal error; see the viewer's log").response()
                await answer(scope, receive, send)
                return
            with contextlib.suppress(Exception):  # completes the response, or uvicorn logs one more line
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def ascii_line(error: Exception) -> str:
    """An error in one short line of printable ASCII."""
    return ascii(" ".join(f"{type(error).__name__}: {error}".split()))[1:-1][:120]


class SafeHeaders:
    """Sets headers that keep browsers from loading other hosts' content and other sites from framing the page.

    Drops `FORWARDING_HEADERS`, from which gradio would build the page's own address.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if not name.startswith(FORWARDING_HEADERS)]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send_with_headers)
