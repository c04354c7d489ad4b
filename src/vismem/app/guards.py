"""Guards of the viewer: ASGI middleware as in `serving/guards.py`, and a check of the files that events name.

Gradio serves much that this page does not use: its own API, recordings, a history of runs that can be sent to a hub in
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

from vismem.serving.access import request_line
from vismem.serving.errors import ApiError, refuse
from vismem.serving.guards import BodyLimit, Check, Hosts, Origins, digest, hosts_for

log = logging.getLogger(__name__)
INVALID_EVENT = "The page sent an invalid request: reload it."
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
    """Wraps the page in its guards; see `web` for the arguments."""
    hosts = hosts_for(address)
    app = PathCheck(SizeLimits(ErrorBoundary(app)))
    if password is not None:
        app = PasswordCheck(app, password)
    app = OriginCheck(app)
    return SafeHeaders(app if hosts is None else HostCheck(app, hosts))


class HostCheck(Hosts):
    """Refuses a `Host` header that does not name this machine."""

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        return ApiError(403, "the viewer does not serve that host name") if super().wrong(scope, headers) else None


class OriginCheck(Origins):
    """Refuses requests sent by pages of other origins."""

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        return ApiError(403, "the viewer refuses other origins") if super().wrong(scope, headers) else None


class PasswordCheck(Check):
    """HTTP Basic authentication with one password and any user name."""

    def __init__(self, app: ASGIApp, password: str) -> None:
        super().__init__(app)
        self.digest = digest(password.encode())

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
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

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
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
            reason = ascii(" ".join(f"{type(error).__name__}: {error}".split()))[1:-1][:120]
            log.error("the viewer failed at %s: %s", request_line(scope), reason, exc_info=debugging)
            if not started:
                answer = ApiError(500, "internal error; see the viewer's log").response()
                await answer(scope, receive, send)
                return
            with contextlib.suppress(Exception):  # completes the response, or uvicorn logs one more line
                await send({"type": "http.response.body", "body": b"", "more_body": False})


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


class Blocks(gr.Blocks):
    """A gradio page whose visitors can ask only about files that they uploaded, not about others on this machine.

    Gradio copies every file named in a request to a place it serves. It checks the names only in pages that it launched
    itself; this page is mounted into another application, so they are checked here.
    """

    # Not in gradio's documented interface, but the one place all inputs go through; tested with gradio 6.31.0.
    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **named: Any) -> list[Any]:
        """An event's inputs. Raises gr.Error if one is invalid or names a file that was not uploaded."""
        folder = os.path.realpath(get_upload_folder())
        for path in paths(inputs):
            if not isinstance(path, str) or "\0" in path or not inside(path, folder):
                raise gr.Error("That file was not uploaded to this page: upload it again.", print_exception=False)
        try:
            return await super().preprocess_data(block_fn, inputs, *more, **named)
        except Exception as error:  # components raise errors of any type, and gradio would print the traceback
            debugging = log.isEnabledFor(logging.DEBUG)
            log.warning("invalid event %s: %s", block_fn.name, type(error).__name__, exc_info=debugging)
            message = error.message if isinstance(error, gr.Error) else INVALID_EVENT
            raise gr.Error(message, print_exception=False) from None


def paths(value: Any) -> Iterator[Any]:
    """Every file path in what a browser sent, at any depth."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from paths(each)


def inside(path: str, folder: str) -> bool:
    """Whether a file is in the folder once symbolic links are resolved."""
    return os.path.realpath(path).startswith(folder + os.sep)
