"""Errors in OpenAI's format, also when they come from another process."""

from __future__ import annotations

import json
import pickle

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


from vismem.serving.errors import ApiError


def test_an_error_has_openais_format_and_survives_serialization() -> None:
    error = ApiError(400, 'bad "field"\ud800', code="odd", param="messages", headers={"X-Y": "z"})
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert str(each) == error.message
        assert each.body() == {
            "error": {
                "message": 'bad "field"\ud800',
                "type": "invalid_request_error",
                "param": "messages",
                "code": "odd",
            }
        }
        found = each.response()
        assert (found.status_code, found.headers["x-y"]) == (400, "z")
        assert json.loads(found.body) == each.body()


@pytest.mark.parametrize(
    "status, type, code, header",
    [
        (401, "authentication_error", "invalid_api_key", ("www-authenticate", "Bearer")),
        (429, "rate_limit_error", "rate_limit_exceeded", ("retry-after", "1")),
        (503, "server_error", "unavailable", ("retry-after", "5")),
        (500, "server_error", None, ("content-type", "application/json")),
        (413, "invalid_request_error", "request_too_large", ("content-type", "application/json")),
    ],
)
def test_statuses_have_default_types_codes_and_headers(status, type, code, header) -> None:
    error = ApiError(status, "no")
    assert (error.type, error.code) == (type, code)
    assert error.response().headers[header[0]] == header[1]
