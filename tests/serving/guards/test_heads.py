"""Request headers over real sockets: ambiguous lengths, old versions, noise, hosts and origins."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from guarded_site import AUTH, Site
from loopback import connected, error_of, exchanged, get, head_of, listening, post, rest

from vismem.serving.connections import ConnectionLimits, uvicorn_settings
from vismem.serving.guards import guarded, hosts_for


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: -5",
        "Content-Length: +5",
        "Content-Length: 0x5",
        "Content-Length: 5, 6",
        "Content-Length: 99999999999999999999999999",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "X: a\r\n Content-Length: 5\r\nContent-Length : 5",
        "X: \0",
        "X: a\r\n folded",
        "X: a\r\n\tfolded",
        "Transfer-Encoding:\r\n chunked",
        "Content-Length:\r\n 5",
        "X: a\nContent-Length: 5",
        "Content-Length: 5\nX: a",
        "X: a\rContent-Length: 5",
        "X: a\r",
    ],
)
def test_ambiguous_body_lengths_are_refused(site: Site, port: int, head: str) -> None:
    seen = len(site.bodies)
    hidden = b"0\r\n\r\n" + get("/v1/models", AUTH)
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", hidden, AUTH, *head.split("\r\n"), length=""))
        answer = rest(raw)
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    status, _ = head_of(answer)
    assert status == 400, answer
    assert error_of(answer.partition(b"\r\n\r\n")[2])["type"] == "invalid_request_error"
    assert len(site.bodies) == seen


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n",
        b"GET /health HTTP/1.1\nHost: localhost\r\n\r\n",
        b"\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: local\r\n host\r\n\r\n",
    ],
)
def test_loose_line_ends_and_folded_lines_are_refused(port: int, dropped: list[str], head: bytes) -> None:
    dropped.clear()
    with connected(port) as raw:
        raw.sendall(head + get("/health"))
        answer = rest(raw)
    assert head_of(answer)[0] == 400 and answer.count(b"HTTP/1.1 ") == 1 and dropped == ["bad_http"]


@pytest.mark.parametrize(
    "chunks",
    [
        b"1\nx\r\n0\r\n\r\n",
        b"1;a\rb\r\nx\r\n0\r\n\r\n",
        b"1;a\nb\r\nx\r\n0\r\n\r\n",
        b"1\r\nx\n0\r\n\r\n",
        b"1\r\nx\r\n0\r\n\n",
        b"1\r\nx\r\n0\r\nX: a\n\r\n",
        b"1\r\nx\r\n0\r\nX: a\r\n b\r\n\r\n",
    ],
)
def test_loose_line_ends_in_chunks_are_refused(site: Site, port: int, dropped: list[str], chunks: bytes) -> None:
    dropped.clear()
    seen = len(site.bodies)
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", chunks, AUTH, "Transfer-Encoding: chunked", length=""))
        answer = rest(raw)
    assert head_of(answer)[0] == 400 and dropped == ["bad_http"] and len(site.bodies) == seen


def test_loose_line_ends_are_fine_inside_a_body(site: Site, port: int) -> None:
    for body in (b'{\n "a":\r 1}', b"\n\n", b"\r\n x"):
        assert exchanged(port, post("/v1/echo", body, AUTH))[0] == 200
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        assert exchanged(port, post("/v1/echo", chunked, AUTH, "Transfer-Encoding: chunked", length=""))[0] == 200


@pytest.mark.parametrize("request_line", ["PRI * HTTP/2.0", "GET /health HTTP/9.9", "GET /health HTTP/0.9"])
def test_other_versions_of_http_are_refused(port: int, request_line: str) -> None:
    status, _, body = exchanged(port, f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
    assert (status, error_of(body)["code"]) == (505, "bad_http")


def test_chunks_with_http_1_0_are_refused(port: int) -> None:
    request = post("/v1/echo", b"0\r\n\r\n", AUTH, "Transfer-Encoding: chunked", length="")
    assert exchanged(port, request.replace(b"HTTP/1.1", b"HTTP/1.0"))[0] == 400


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"\0" * 1000 + b"\r\n\r\n",
    ],
)
def test_non_http_gets_a_json_error(port: int, dropped: list[str], noise: bytes) -> None:
    dropped.clear()
    with connected(port) as raw:
        raw.sendall(noise)
        answer = rest(raw)
    status, headers = head_of(answer)
    assert (status, headers["connection"]) == (400, "close")
    assert error_of(answer.partition(b"\r\n\r\n")[2])["code"] == "bad_http"
    assert dropped == ["bad_http"]


@pytest.mark.parametrize(
    "headers",
    [
        [f"X-{i}: y" for i in range(101)],
        [f"X-{i}: {'y' * 500}" for i in range(40)],
        [f"X-{i}: y" for i in range(10_000)],
        ["X: " + "y" * 1_000_000],
    ],
    ids=["many", "large", "very many", "very large"],
)
def test_many_and_large_headers_are_refused(port: int, headers: list[str]) -> None:
    status, _, body = exchanged(port, get("/health", *headers))
    assert status in (400, 431)
    assert error_of(body)["code"] in ("bad_http", "headers_too_large")


def test_headers_within_the_limits_are_accepted(port: int) -> None:
    assert exchanged(port, get("/health", *[f"X-{i}: y" for i in range(90)]))[0] == 200
    assert exchanged(port, get("/health", f"X: {'y' * 12_000}"))[0] == 200
    assert exchanged(port, get("/health", *[f"X-{i}: y" for i in range(100)]))[0] == 431
    assert exchanged(port, get("/" + "x" * 20_000))[0] in (400, 431)


def test_only_uncompressed_json_is_accepted(port: int) -> None:
    for header in ("Content-Type: text/plain", "Content-Type: application/x-www-form-urlencoded", "Content-Type: x"):
        status, _, body = exchanged(port, post("/v1/echo", b"{}", AUTH, header))
        assert (status, error_of(body)["code"]) == (415, "unsupported_media_type")
    assert exchanged(port, post("/v1/echo", b"{}", AUTH, "Content-Encoding: gzip"))[0] == 415
    assert exchanged(port, post("/v1/echo", b"{}", AUTH, "Content-Type: Application/JSON; charset=utf-8"))[0] == 200


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("127.0.0.1:1", 200),
        ("127.9.9.9", 200),
        ("[::1]:8000", 200),
        ("app.localhost", 200),
        ("model.example.org", 200),
        ("gpu.lab.example.org:80", 200),
        ("lab.example.org", 403),
        ("evillab.example.org", 403),
        ("evil.example.org", 403),
        ("localhost.evil.example.org", 403),
        ("127.0.0.1.evil.example.org", 403),
        ("localhost:x", 403),
        ("localhost@evil.example.org", 403),
        ("[::1", 403),
        ("[::1]x", 403),
        ("0x7f.1", 403),
        ("192.168.0.1", 403),
        (":80", 403),
        ("", 403),
    ],
)
def test_unknown_host_names_are_refused(port: int, host: str, status: int) -> None:
    found = exchanged(port, get("/health", host=host))
    assert found[0] == status
    assert status == 200 or error_of(found[2])["code"] == "forbidden"


def test_hosts_for_an_address() -> None:
    assert hosts_for("0.0.0.0") is None and hosts_for("::") is None
    assert hosts_for("0.0.0.0", ["model.example.org"]) == ["model.example.org"]
    for address in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        assert "localhost" in (hosts_for(address) or [])


def test_only_allowed_origins_may_use_the_server(site: Site, port: int) -> None:
    seen = len(site.bodies)
    for origin in (
        "https://evil.example.org",
        "null",
        "https://page.example.org.evil.example.org",
        "http://localhost:1",
    ):
        status, headers, body = exchanged(port, post("/v1/echo", b"{}", AUTH, f"Origin: {origin}"))
        assert (status, error_of(body)["code"]) == (403, "forbidden")
        assert "access-control-allow-origin" not in headers
    assert len(site.bodies) == seen
    status, headers, _ = exchanged(port, post("/v1/echo", b"{}", AUTH, "Origin: https://page.example.org"))
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example.org")
    assert exchanged(port, post("/v1/echo", b"{}", AUTH, "Host: localhost:7", "Origin: http://localhost:7"))[0] == 200
    asked = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"]
    preflight = get("/v1/echo", "Origin: https://page.example.org", *asked).replace(b"GET", b"OPTIONS", 1)
    assert exchanged(port, preflight)[0] == 200
    assert exchanged(port, preflight.replace(b"page", b"evil"))[0] == 400


def test_without_allowed_origins_there_is_no_cors() -> None:
    site = Site()
    with listening(guarded(site.app), **uvicorn_settings(ConnectionLimits())) as port:
        status, headers, _ = exchanged(port, get("/health", "Origin: https://page.example.org"))
        assert status == 403 and not any(name.startswith("access-control") for name in headers)
        assert exchanged(port, get("/v1/models", host="any.example.org"))[0] == 200
