"""Errors in OpenAI's format.

Raise `ApiError` in a route, where `server.py` turns it into a response. In plain ASGI, call
`await refuse(error, scope, receive, send)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

LINGER = 2.0  # seconds for which the rest of a refused body is read, so that the client gets to read the refusal

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    503: "unavailable",
    504: "timeout",
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


class ApiError(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        message: one line for the client: what, why, what to do.
        type: OpenAI's error type; by default the usual one for the status.
        code: a machine-readable code; by default the usual one for the status.
        param: the request field at fault, e.g. "messages".
        headers: extra response headers; 401, 429 and 503 have defaults.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message)  # which pickle passes to a copy
        self.status, self.message, self.param = status, message, param
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.code = code or CODES.get(status)
        self.headers = {**HEADERS.get(status, {}), **(headers or {})}

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """A Starlette response. Its JSON is ASCII, so any message can be encoded."""
        return Response(json.dumps(self.body()).encode("ascii"), self.status, self.headers, "application/json")


def stopping() -> ApiError:
    """The server is shutting down."""
    return ApiError(503, "the server is stopping; try again when it is back")


def internal_error() -> ApiError:
    """An unexpected exception, whose details stay in the log."""
    return ApiError(500, "the server failed; its log has the reason")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends an error, and closes the connection if the request has a body.

    A client that is cut off while sending may never read the response. So the response is sent in full, the rest of the
    body is read and discarded for at most `LINGER` seconds, and only then is the response completed.
    """
    response = error.response()
    if not has_body(Headers(scope=scope)):
        await response(scope, receive, send)
        return
    response.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    with anyio.move_on_after(LINGER):
        while (await receive()).get("more_body", False):
            pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def has_body(headers: Headers) -> bool:
    """Whether the headers announce a body."""
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
