"""Errors in OpenAI's form: one exception that says everything about its response.

`raise` it in a route: `server.py` hands it to `response()`. In pure ASGI, `await refuse(error, scope, receive, send)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

LINGER = 2.0  # seconds that a refused client may go on sending, so that it reads the refusal before the connection ends

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
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line for the client: what, why, what to do.
        type: OpenAI's kind of error; by default the usual one for the status.
        code: a word for programs; by default the usual one for the status.
        param: the field of the request that is wrong, e.g. "messages".
        headers: more headers of the response; 401, 429 and 503 have theirs unless given here.
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
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.code = code or CODES.get(status)
        self.headers = {**HEADERS.get(status, {}), **(headers or {})}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def content(self) -> bytes:
        """The same as JSON; plain ASCII, whatever the message has in it."""
        return json.dumps(self.body()).encode("ascii")

    def response(self) -> Response:
        """A response, which is an ASGI application at the same time."""
        return Response(self.content(), self.status, self.headers, "application/json")


def stopping() -> ApiError:
    """The server is being stopped."""
    return ApiError(503, "the server is stopping; try again when it is back")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with an error, and ends the connection where a body is still on its way.

    A client that is cut off while it sends may never see the answer. So the answer goes out whole, what still comes is
    thrown away for at most `LINGER` seconds, and only then is the response called complete.
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
    """Whether a request says that a body follows its head."""
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
