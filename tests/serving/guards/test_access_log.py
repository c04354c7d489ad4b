"""The access log: one printable line per request, without secrets, never blocking."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from guarded_site import AUTH, GUARDS, Site
from loopback import PATIENCE, exchanged, get, listening, post, until

from vismem.serving.access import LineWriter, RequestLog, request_line
from vismem.serving.connections import ConnectionLimits, uvicorn_settings
from vismem.serving.engine import Load
from vismem.serving.guards import guarded
from vismem.serving.metrics import Metrics


def logged(*requests: bytes) -> list[str]:
    """The lines of requests to a small application."""
    lines: list[str] = []
    app = RequestLog(guarded(Site().app, **GUARDS), Metrics(lambda: Load(0, 0)), lines.append)
    with listening(app, **uvicorn_settings(ConnectionLimits())) as port:
        for request in requests:
            exchanged(port, request)
        until(lambda: len(lines) == len(requests))
    return lines


def test_a_request_is_one_line_without_secrets():
    secret = "x" * 5000
    lines = logged(
        get("/v1/models?api_key=sk-secret", AUTH),
        get("/v1/models"),
        get("/%0d%0aGET%20/x%1b[31m", AUTH),
        get("/" + secret, AUTH),
        post("/v1/echo", b'{"messages": "a secret text"}', AUTH),
        get("/health", "Authorization: Bearer another").replace(b"GET", b"BREW"),
    )
    patterns = [
        "GET /v1/models 200",
        "GET /v1/models 401",
        r"GET /%0d%0aGET%20/x%1b\[31m 404",
        r"GET /x{199}\.\.\. 404",
        "POST /v1/echo 200",
        "BREW /health 405",
    ]
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {pattern} \d+\.\d{{3}}s", line), line
        assert line.isprintable() and line.isascii()
    assert not re.search("secret|another|sk-", "".join(lines))


def test_any_request_line_is_printable():
    scope = {"method": "G\x1bT" * 100, "path": "", "raw_path": b"/\xff\n\x07?key"}
    shown = request_line(scope)
    assert shown.isprintable() and shown.endswith(r" /\xff\n\x07") and len(shown) < 40


def test_a_blocked_log_does_not_block_requests():
    reading, writing = os.pipe()
    try:
        lines = LineWriter(writing, max_queued=10)
        for _ in range(50):
            lines("x" * 10**6)  # more than a pipe holds
        lines.close(0.1)
        assert lines.thread.is_alive()
        os.close(reading)
        lines.thread.join(PATIENCE)
        assert not lines.thread.is_alive()
    finally:
        os.close(writing)
