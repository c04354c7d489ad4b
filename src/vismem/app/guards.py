"""What stands between the network and the page: each guard is a small piece of pure ASGI, as in `serving/guards.py`.

Gradio serves much that this page does not use: its own API, recordings, a history of runs that may talk to a hub in the
owner's name. Here is what the page does use, how much may come at once, and who may come.
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
USED = re.compile(  # the page, its parts, its exports, and of gradio's API what the page calls
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(?:assets|static|svelte|export)/.+"
    r"|/gradio_api/(?:queue/(?:join|data)|upload|upload_progress|heartbeat/[^/]+|file=.+|cancel|reset|info|app_id"
    r"|startup-events)/?"
)
LARGEST_BODY, MOST_PARTS = 2**20, 100_000  # bytes of what is no upload, and commas in it
LARGEST_UPLOAD, KEPT_UPLOADS = 256 * 2**20, 4 * 2**30  # bytes of one, and of all that are there
NAMING = (b"x-forwarded-", b"x-gradio-server")
OWN = "'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # gradio's scripts are inline, and make functions
HEADERS = {
    "Content-Security-Policy": f"default-src {OWN}; frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def guarded(app: ASGIApp, address: str, password: str | None = None) -> ASGIApp:
    """The page with its guards around it.

    Args:
        app: the page.
        address: where it listens. On loopback it answers to loopback's names alone.
        password: what visitors must know, if there is one.
    """
    hosts = hosts_for(address)
    app = Used(Sizes(Failing(app)))
    if password is not None:
        app = Password(app, password)
    app = OwnPages(app)
    return Sealed(app if hosts is None else OwnName(app, hosts))


class OwnName(Hosts):
    """Refuses to be called by another name than this computer's own."""

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Hosts`."""
        return ApiError(403, "the viewer does not answer to that name") if super().wrong(scope, headers) else None


class OwnPages(Origins):
    """Refuses what a web page of another origin makes the browser send."""

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Origins`."""
        return ApiError(403, "other pages may not use the viewer") if super().wrong(scope, headers) else None


class Password(Check):
    """Asks for a password, as HTTP's Basic authentication does; any name goes with it."""

    def __init__(self, app: ASGIApp, password: str) -> None:
        super().__init__(app)
        self.digest = digest(password.encode())

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        given = headers.getlist("authorization")
        scheme, _, coded = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        try:
            found = base64.b64decode(coded.strip(), validate=True).partition(b":")[2]
        except ValueError:
            found = b""
        if hmac.compare_digest(digest(found), self.digest) and scheme.lower() == "basic":
            return None
        asking = {"WWW-Authenticate": 'Basic realm="VisMem", charset="UTF-8"'}
        return ApiError(401, "the viewer needs its password; any user name goes with it", headers=asking)


class Used(Check):
    """Lets through what the page uses."""

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        return None if USED.fullmatch(scope["path"]) else ApiError(404, "the viewer has no such page")


class Sizes:
    """Bounds what is sent: files by the length that browsers tell, everything else by what comes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.small = app, BodyLimit(app, LARGEST_BODY, max_held=64 * 2**20, max_commas=MOST_PARTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != UPLOAD:
            await self.small(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "")
        if not told.isdecimal() or len(told) > 20:
            error = ApiError(411, "an upload must tell its Content-Length")
        elif int(told) > LARGEST_UPLOAD:
            error = ApiError(413, f"files of {LARGEST_UPLOAD >> 20} MiB at once are the limit; drop in fewer")
        elif await asyncio.to_thread(held) + int(told) > KEPT_UPLOADS:
            error = ApiError(503, "the viewer holds as many files as it may; old ones go within the hour")
        else:
            await self.app(scope, receive, send)
            return
        await refuse(error, scope, receive, send)


def held() -> int:
    """Bytes of all files that were dropped into the page and are still there."""
    found = 0
    for folder, _, names in os.walk(get_upload_folder()):
        for name in names:
            try:
                found += (Path(folder) / name).stat().st_size
            except OSError:  # it has just gone
                continue
    return found


class Failing:
    """Says in one line of the log that a request failed, and where it is not answered yet, answers that it did.

    Gradio fails at much that no page sends, and each time where it did would fill the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            debugging = log.isEnabledFor(logging.DEBUG)
            log.error("the viewer failed at %s: %s", request_line(scope), brief(error), exc_info=debugging)
            if not begun:
                answer = ApiError(500, "the viewer failed at this; its log has the reason").response()
                await answer(scope, receive, send)
                return
            with contextlib.suppress(Exception):  # else uvicorn has another line to say about it
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def brief(error: Exception) -> str:
    """An error in one short line of printable ASCII."""
    return ascii(" ".join(f"{type(error).__name__}: {error}".split()))[1:-1][:120]


class Sealed:
    """Tells browsers to load nothing from elsewhere, and to show the page in no other site's frame.

    Headers in which a client names the server (`NAMING`) are dropped: gradio would build the page's own address from
    them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if not name.startswith(NAMING)]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, sealed)
