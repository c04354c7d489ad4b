"""Guards that need no more of a request than its head: form, `Host`, `Origin`, key.

In which order they stand is for `guards.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vismem.serving.errors import ApiError, has_body, refuse

OPEN = ("/health",)  # answered without a key


class Check:
    """A guard that looks at a request's head alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why the request is refused, if it is."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.wrong(scope, Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await refuse(error, scope, receive, send)


class WellFormed(Check):
    """Refuses what servers and proxies may read in different ways, large heads, and bodies that are no JSON."""

    def __init__(self, app: ASGIApp, max_headers: int = 100, max_head: int = 16 * 2**10) -> None:
        super().__init__(app)
        self.max_headers, self.max_head = max_headers, max_head

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        if scope["http_version"] not in ("1.0", "1.1"):
            return ApiError(505, "this server speaks HTTP/1.1", code="bad_http")
        size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) + 4 for name, value in headers.raw)
        if len(headers.raw) > self.max_headers:
            return ApiError(431, f"{len(headers.raw)} headers; at most {self.max_headers} are taken")
        if size > self.max_head:
            return ApiError(431, f"the headers have {size} bytes; at most {self.max_head} are taken")
        if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
            return ApiError(400, "a body has either a Content-Length or, in HTTP/1.1, a Transfer-Encoding")
        if not has_body(headers):
            return None
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            return ApiError(415, "the body must be sent as it is, without a Content-Encoding")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return ApiError(415, "the body must be JSON; send it with Content-Type: application/json")
        return None


class Hosts(Check):
    """Refuses other names than the server's own, with which a web page could reach it over DNS (rebinding)."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        super().__init__(app)
        self.allowed = [name.lower() for name in allowed]

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        given = headers.getlist("host")
        name = _host_name(given[0]) if len(given) == 1 else None
        if name is not None and any(_matches(name, each) for each in self.allowed):
            return None
        return ApiError(403, "this server does not answer to that Host; start it with --allow-host to let it")


def hosts_for(address: str, allowed: Sequence[str] = ()) -> list[str] | None:
    """The names that a server may be called by.

    Args:
        address: that it listens on.
        allowed: names that were asked for.

    Returns:
        Those, and on a loopback address the names of loopback; None, which is any, where it listens elsewhere
        and nothing was asked for.
    """
    if is_loopback(address):
        return ["localhost", "*.localhost", "loopback", *allowed]
    return list(allowed) or None


def _matches(name: str, allowed: str) -> bool:
    if allowed == "loopback":
        return is_loopback(name)
    if allowed.startswith("*."):
        return name.endswith(allowed[1:]) and len(name) > len(allowed) - 1
    return name == allowed.strip("[]")


def is_loopback(name: str) -> bool:
    """Whether an address, or `localhost`, is this computer's own and no network's."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_name(value: str) -> str | None:
    """The name in a `Host` header, without the port; None where there is none to be read."""
    value = value.strip().lower()
    if value.startswith("["):
        name, closed, port = value[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = value.partition(":")
    return name if name and (not port or port.isdecimal()) else None


class Origins(Check):
    """Refuses requests that a web page of another origin makes the browser send: they would cost a model's time."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str] = ()) -> None:
        super().__init__(app)
        self.allowed = [each.lower() for each in allowed]

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        for origin in headers.getlist("origin"):
            own = origin.lower().partition("://")[2] == headers.get("host", "").lower() != ""
            if not own and origin.lower() not in self.allowed and "*" not in self.allowed:
                return ApiError(403, "pages of this origin may not use the server; start it with --allow-origin")
        return None


class ApiKeys(Check):
    """Asks for one of several keys. How long the answer takes tells nothing about them."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], public: Sequence[str] = OPEN) -> None:
        super().__init__(app)
        self.digests = [digest(key.encode()) for key in keys]
        self.public = public

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        if scope["path"] in self.public:
            return None
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        found = digest(key.strip().encode("latin-1"))
        right = sum(hmac.compare_digest(found, each) for each in self.digests)  # all of them, whichever is right
        if scheme.lower() == "bearer" and right:
            return None
        if not given:
            return ApiError(401, "no API key; send it as Authorization: Bearer KEY")
        return ApiError(401, "the API key is not one of this server's")


def digest(key: bytes) -> bytes:
    """What secrets are compared by, in the same time whichever they are."""
    return hashlib.sha256(key).digest()


def read_keys(
    given: Sequence[str] = (), file: Path | None = None, environ: Mapping[str, str] | None = None
) -> list[str]:
    """API keys from everywhere they may be.

    Args:
        given: as options.
        file: one key a line; empty lines and those that begin with # are left out.
        environ: variables; `VISMEM_API_KEY` has one key, or several between commas.

    Raises:
        ValueError: if a key is empty or cannot be sent in a header, or the file cannot be read or has none. No message
            has a key in it.
    """
    keys = [("an API key of the command line", key) for key in given]
    if "VISMEM_API_KEY" in (environ or {}):
        keys += [("an API key in VISMEM_API_KEY", key) for key in (environ or {})["VISMEM_API_KEY"].split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read API keys from {file}: {getattr(error, 'strerror', None) or error}") from None
        found = [(f"an API key in {file}", line) for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"there is no API key in {file}; put one in a line of its own")
        keys += found
    for place, key in keys:
        if not key.strip() or not key.isascii() or not key.strip().isprintable() or " " in key.strip():
            raise ValueError(f"{place} is empty or has characters that do not fit a header; take letters and digits")
    return list(dict.fromkeys(key.strip() for _, key in keys))
