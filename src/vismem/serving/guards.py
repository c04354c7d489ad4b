"""ASGI guards around the application: Host, Origin, headers, API keys, bodies.

`guarded` applies them in order: whatever can be decided from the headers is decided before a body is read, and the API
key is checked before memory is spent on one. Slow clients and the number of connections are handled in
`connections.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

from vismem.serving.errors import ApiError, has_body, refuse, stopping

PUBLIC = ("/health",)  # paths that need no key
MAX_HEADERS, MAX_HEAD = 100, 16 * 2**10  # of a request: their number, and bytes of all of them
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::[0-9]*)?")
SMALL_BODY = 16 * 2**10  # bytes that are accepted beyond `max_held`, so that stalled uploads do not block text requests
SHUTDOWN_TIMEOUT = 1.0  # seconds that a client has to read the shutdown error
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def guarded(
    app: ASGIApp,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    max_body: int = 32 * 2**20,
    body_timeout: float = 30.0,
    max_held: int = 256 * 2**20,
    max_commas: int = 50_000,
) -> ASGIApp:
    """The application with its guards around it.

    Args:
        app: the application.
        keys: accepted API keys; if empty, no key is needed.
        hosts: accepted `Host` names (`"*.example.org"` for subdomains), or None for any. See `hosts_for`.
        origins: web origins that may use the server from a browser, e.g. "https://example.org"; "*" for all.
        max_body, body_timeout, max_held, max_commas: see `BodyLimit`.
    """
    app = BodyLimit(app, max_body, body_timeout, max_held, max_commas)
    if keys:
        app = ApiKeys(app, keys)
    app = Origins(WellFormed(app), origins)
    if hosts is not None:
        app = Hosts(app, hosts)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return SafeHeaders(ShutdownNotice(app))


class Check:
    """A guard that only reads the request's headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """The error to refuse the request with, or None to let it through."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.wrong(scope, Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await refuse(error, scope, receive, send)


class WellFormed(Check):
    """Refuses ambiguous requests that proxies may parse differently, oversized headers, and bodies other than JSON."""

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        if scope["http_version"] not in ("1.0", "1.1"):
            return ApiError(505, "this server speaks HTTP/1.1", code="bad_http")
        size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) + 4 for name, value in headers.raw)
        if len(headers.raw) > MAX_HEADERS:
            return ApiError(431, f"the request has {len(headers.raw)} headers; the limit is {MAX_HEADERS}")
        if size > MAX_HEAD:
            return ApiError(431, f"the headers have {size} bytes; the limit is {MAX_HEAD}")
        if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
            return ApiError(400, "send either Content-Length or, with HTTP/1.1, Transfer-Encoding")
        if not has_body(headers):
            return None
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            return ApiError(415, "compressed bodies are not supported; send the body without Content-Encoding")
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            return ApiError(415, "the body must be JSON; send it with Content-Type: application/json")
        return None


class Hosts(Check):
    """Refuses unknown `Host` names, through which a web page could reach the server by DNS rebinding."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        super().__init__(app)
        self.allowed = [name.lower() for name in allowed]

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        given = headers.getlist("host")
        found = HOST.fullmatch(given[0].strip().lower()) if len(given) == 1 else None
        if found and any(_matches(found[1].strip("[]"), allowed) for allowed in self.allowed):
            return None
        return ApiError(403, "this server does not answer to that Host; allow it with --allow-host")


def hosts_for(address: str, allowed: Sequence[str] = ()) -> list[str] | None:
    """The `Host` names to accept, or None for any.

    Args:
        address: the address that the server listens on.
        allowed: further names.

    Returns:
        On a loopback address, loopback's names and `allowed`; elsewhere `allowed`, or None if that is empty.
    """
    if is_loopback(address):
        return ["localhost", "*.localhost", "loopback", *allowed]
    return list(allowed) or None


def is_loopback(name: str) -> bool:
    """Whether `name` is `localhost` or a loopback address."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _matches(name: str, allowed: str) -> bool:
    if allowed == "loopback":
        return is_loopback(name)
    if allowed.startswith("*."):
        return name.endswith(allowed[1:]) and len(name) > len(allowed) - 1
    return name == allowed.strip("[]")


class Origins(Check):
    """Refuses requests sent by web pages of other origins."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str] = ()) -> None:
        super().__init__(app)
        self.allowed = [origin.lower() for origin in allowed]

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        for origin in headers.getlist("origin"):
            own = origin.lower().partition("://")[2] == headers.get("host", "").lower() != ""
            if not own and origin.lower() not in self.allowed and "*" not in self.allowed:
                return ApiError(403, "pages of this origin may not use the server; allow it with --allow-origin")
        return None


class ApiKeys(Check):
    """Requires one of several API keys, compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        super().__init__(app)
        self.digests = [digest(key.encode()) for key in keys]

    @override
    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        if scope["path"] in PUBLIC:
            return None
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        found = digest(key.strip().encode("latin-1"))
        known = sum(hmac.compare_digest(found, each) for each in self.digests)  # `any` would stop at the match
        if scheme.lower() == "bearer" and known:
            return None
        if not given:
            return ApiError(401, "no API key; send it as Authorization: Bearer KEY")
        return ApiError(401, "the API key is not one of this server's")


def digest(key: bytes) -> bytes:
    """A hash of a secret, so that comparing two takes equally long whatever their lengths."""
    return hashlib.sha256(key).digest()


def read_keys(
    given: Sequence[str] = (), file: Path | None = None, environ: Mapping[str, str] | None = None
) -> list[str]:
    """Collects API keys.

    Args:
        given: keys from the command line.
        file: one key per line; empty lines and lines starting with # are skipped.
        environ: environment variables; `VISMEM_API_KEY` holds one key, or several separated by commas.

    Raises:
        ValueError: if a key is empty or cannot be sent in a header, or the file is unreadable or has no key. The
            message never contains a key.
    """
    keys = [("an API key on the command line", key) for key in given]
    if (listed := (environ or {}).get("VISMEM_API_KEY")) is not None:
        keys += [("an API key in VISMEM_API_KEY", key) for key in listed.split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read API keys from {file}: {getattr(error, 'strerror', None) or error}") from None
        found = [(f"an API key in {file}", line) for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"there is no API key in {file}; write one per line")
        keys += found
    for place, key in keys:
        if not key.strip() or not key.isascii() or not key.strip().isprintable() or " " in key.strip():
            raise ValueError(f"{place} is empty or cannot be sent in a header; use letters and digits")
    return list(dict.fromkeys(key.strip() for _, key in keys))


class BodyLimit:
    """Reads each body before the application sees it, within limits of size, time and total memory.

    The application gets the body in one piece, which counts as held until the application returns.

    Args:
        app: the application.
        max_body: bytes per body.
        timeout: seconds for a body to arrive.
        max_held: bytes of all bodies held at the same time; a body of at most `SMALL_BODY` is accepted beyond it.
        max_commas: commas per body.
    """

    def __init__(
        self, app: ASGIApp, max_body: int, timeout: float = 30.0, max_held: int = 2**28, max_commas: int = 50_000
    ) -> None:
        self.app, self.max_body, self.timeout = app, max_body, timeout
        self.max_held, self.max_commas = max_held, max_commas
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            complete = await self._read(scope, receive, body)
        except BaseException as error:
            self.held -= len(body)
            if not isinstance(error, ApiError):
                raise
            body.clear()
            await refuse(error, scope, receive, send)
            return
        size = len(body)
        content: list[bytes] = [bytes(body)]
        body.clear()

        async def replay() -> Message:
            return {"type": "http.request", "body": content.pop(), "more_body": False} if content else await receive()

        try:
            if complete:  # otherwise the client has disconnected
                await self.app(scope, replay, send)
        finally:
            self.held -= size

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or len(announced) > 20:
            raise ApiError(400, "Content-Length must be a number of bytes")
        if int(announced) > self.max_body:
            raise self._too_large()
        with anyio.move_on_after(self.timeout):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                piece, more = message.get("body", b""), message.get("more_body", False)
                if len(body) + len(piece) > self.max_body:
                    raise self._too_large()
                if self.held + len(piece) > self.max_held and len(body) + len(piece) > SMALL_BODY:
                    raise ApiError(503, "the server is holding as many requests as it can; try again in a moment")
                body += piece
                self.held += len(piece)
            if body.count(b",") > self.max_commas:
                raise ApiError(
                    413,
                    f"the body has more than {self.max_commas} commas, so too many JSON values; send less at once",
                )
            return True
        raise ApiError(408, f"the body did not arrive within {self.timeout:g} seconds")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.max_body} bytes, the limit; send fewer or smaller images")


class ShutdownNotice:
    """Sends an error to clients whose requests are cancelled by a shutdown.

    A request without a response yet gets status 503; a stream gets the error as its last event.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started: list[Message] = []

        async def send_and_record(message: Message) -> None:
            if not started:
                started.append(message)
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            task = asyncio.current_task()
            assert task is not None
            timer = asyncio.get_running_loop().call_later(SHUTDOWN_TIMEOUT, task.cancel)  # for clients that do not read
            with contextlib.suppress(asyncio.CancelledError):
                response = stopping().response()
                response.headers["Connection"] = "close"
                if not started:
                    await response(scope, receive, send)
                elif "text/event-stream" in Headers(raw=started[0]["headers"]).get("content-type", ""):
                    event = b"data: " + bytes(response.body) + b"\n\n"
                    await send({"type": "http.response.body", "body": event, "more_body": False})
            timer.cancel()


class SafeHeaders:
    """Adds headers that keep browsers from sniffing, caching, running or framing responses. Refuses WebSockets."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_safely)
