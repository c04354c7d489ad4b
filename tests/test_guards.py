"""Abuse from outside over real sockets: what is refused, with which error, and that nothing waits or grows for ever."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pickle
import socket
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from fastapi import FastAPI, Request
from loopback import connected, error_of, exchanged, get, head_of, listening, post, response, rest, until
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response, StreamingResponse

from vismem.serving import errors
from vismem.serving.checks import hosts_for, read_keys
from vismem.serving.connections import Patience, uvicorn_settings
from vismem.serving.errors import ApiError
from vismem.serving.guards import BodyLimit, Guards, guarded

KEY = "sk-one-of-two-keys"
GUARDS = Guards(
    keys=[KEY, "sk-the-other-key"],
    hosts=hosts_for("127.0.0.1", ["model.example.org", "*.lab.example.org"]),
    origins=["https://page.example.org"],
    max_body=100_000,
    body_timeout=0.5,
    together=250_000,
    parts=200,
)
AUTH = f"Authorization: Bearer {KEY}"


class Taken(BaseModel):
    """A request of the test's application."""

    model_config = ConfigDict(extra="forbid")
    text: str = ""
    anything: dict[str, object] | list[object] | None = None


class Site:
    """A small application, and what it has seen."""

    def __init__(self) -> None:
        self.bodies: list[int] = []
        self.streaming, self.ended = 0, 0
        self.hold: threading.Event | None = None
        self.app = app = FastAPI()

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/v1/models")
        async def models() -> list[str]:
            return ["one"]

        @app.post("/v1/echo")
        async def echo(request: Request) -> Response:
            body = await request.body()
            self.bodies.append(len(body))
            while self.hold is not None and not self.hold.is_set():
                await asyncio.sleep(0.01)
            return JSONResponse({"bytes": len(body)})

        @app.post("/v1/parsed")
        async def parsed(body: Taken) -> dict[str, int]:
            return {"text": len(body.text)}

        @app.get("/v1/stream")
        async def stream() -> StreamingResponse:
            async def endless():
                self.streaming += 1
                try:
                    while True:
                        yield b"data: " + b"x" * 4096 + b"\n\n"
                        await asyncio.sleep(0)
                finally:
                    self.ended += 1

            return StreamingResponse(endless(), media_type="text/event-stream")

        @app.get("/v1/pause")
        async def pause() -> StreamingResponse:
            async def halves():
                yield b"x" * 2_000_000
                while self.hold is not None and not self.hold.is_set():
                    await asyncio.sleep(0.01)
                yield b"y"

            return StreamingResponse(halves())

        @app.get("/v1/bytes/{size}")
        async def sized(size: int) -> Response:
            return Response(b"x" * size, media_type="text/plain")


@pytest.fixture(scope="module")
def dropped() -> list[str]:
    return []


@pytest.fixture(scope="module")
def site() -> Site:
    return Site()


@pytest.fixture(scope="module")
def port(site: Site, dropped: list[str]):
    patience = Patience(head=0.5, idle=1.0, write=0.5, connections=60, dropped=dropped.append)
    with listening(guarded(site.app, GUARDS), **uvicorn_settings(patience)) as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "LINGER", 0.3)


# Errors.


def test_an_error_is_openais_and_goes_through_pickle() -> None:
    error = ApiError(400, 'bad "field"\ud800', code="odd", param="messages", headers={"X-Y": "z"})
    again = pickle.loads(pickle.dumps(error))
    for each in (error, again):
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
def test_statuses_have_their_types_codes_and_headers(status, type, code, header) -> None:
    error = ApiError(status, "no")
    assert (error.type, error.code) == (type, code)
    assert error.response().headers[header[0]] == header[1]


# Bodies.


def test_a_body_within_the_limit_comes_through_whole_either_way(site: Site, port: int) -> None:
    status, headers, body = exchanged(port, post("/v1/echo", b"x" * 100_000, AUTH))
    assert (status, json.loads(body)) == (200, {"bytes": 100_000})
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    chunked = b"".join(b"3e8\r\n" + b"x" * 1000 + b"\r\n" for _ in range(100)) + b"0\r\n\r\n"
    found = exchanged(port, post("/v1/echo", chunked, AUTH, "Transfer-Encoding: chunked", length=""))
    assert (found[0], json.loads(found[2])) == (200, {"bytes": 100_000})


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(site: Site, port: int) -> None:
    seen = len(site.bodies)
    for length in (100_001, 10**12, 10**19):
        with connected(port) as raw:
            raw.sendall(post("/v1/echo", b"", AUTH, length=length))
            status, headers, body = response(raw)
            assert (status, error_of(body)["code"]) == (413, "request_too_large")
            assert headers["connection"] == "close"
            assert rest(raw) == b""
    assert len(site.bodies) == seen


def test_a_body_that_lies_or_tells_no_size_is_counted(site: Site, port: int) -> None:
    seen = len(site.bodies)
    chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    status, _, body = exchanged(port, post("/v1/echo", chunk * 50, AUTH, "Transfer-Encoding: chunked", length=""))
    assert (status, error_of(body)["code"]) == (413, "request_too_large")
    assert len(site.bodies) == seen


def test_a_refused_client_that_goes_on_sending_reads_why(port: int) -> None:
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"", AUTH, length=5_000_000))
        raw.sendall(b"x" * 5_000_000)
        status, _, body = response(raw)
    assert status == 413 and "100000 bytes" in error_of(body)["message"]


def test_a_body_that_does_not_come_is_given_up(site: Site, port: int) -> None:
    seen = len(site.bodies)
    for body, headers, length in ((b"{", [], 10), (b"1\r\nx\r\n", ["Transfer-Encoding: chunked"], "")):
        status, headers, told = exchanged(port, post("/v1/echo", body, AUTH, *headers, length=length))
        assert (status, error_of(told)["code"], headers["connection"]) == (408, "request_timeout", "close")
    with connected(port) as raw:  # a byte at a time, for ever
        raw.sendall(post("/v1/echo", b"", AUTH, length=50_000))
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.02):
                    raw.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert response(raw)[0] == 408
        finally:
            stop.set()
            thread.join()
    assert len(site.bodies) == seen


def test_a_client_that_leaves_in_the_middle_of_its_body_reaches_nothing(site: Site, port: int) -> None:
    seen = len(site.bodies)
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"{", AUTH, length=100))
    assert exchanged(port, get("/health"))[0] == 200
    assert len(site.bodies) == seen


def test_all_bodies_together_have_a_limit_and_give_their_room_back(site: Site, port: int) -> None:
    site.hold = threading.Event()
    seen = len(site.bodies)
    try:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connected(port)) for _ in range(2)]
            for raw in held:
                raw.sendall(post("/v1/echo", b"x" * 100_000, AUTH))
            until(lambda: len(site.bodies) == seen + 2)
            status, headers, body = exchanged(port, post("/v1/echo", b"x" * 100_000, AUTH))
            assert (status, error_of(body)["type"], headers["retry-after"]) == (503, "server_error", "5")
            assert exchanged(port, get("/v1/models", AUTH))[0] == 200
            held.append(stack.enter_context(connected(port)))
            held[2].sendall(post("/v1/echo", b"x" * 50_000, AUTH))
            until(lambda: len(site.bodies) == seen + 3)  # all room is taken
            held.append(stack.enter_context(connected(port)))
            held[3].sendall(post("/v1/echo", b"x" * 10_000, AUTH))
            until(lambda: len(site.bodies) == seen + 4)  # but for small ones
            site.hold.set()
            assert [response(raw)[0] for raw in held] == [200] * 4
    finally:
        site.hold = None
    assert exchanged(port, post("/v1/echo", b"x" * 100_000, AUTH))[0] == 200


def test_room_is_given_back_after_every_kind_of_end() -> None:
    async def fails(scope, receive, send) -> None:
        raise RuntimeError("the application fails")

    async def one(limit: BodyLimit, *messages: dict, raises: type[BaseException] | None = None) -> list[dict]:
        sent, coming = [], list(messages)

        async def receive() -> dict:
            return coming.pop(0) if coming else await asyncio.Event().wait()

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/", "headers": [(b"transfer-encoding", b"chunked")]}
        with pytest.raises(raises) if raises else contextlib.nullcontext():
            await limit(scope, receive, send)
        return sent

    async def everything() -> None:
        limit = BodyLimit(fails, most=10, timeout=0.05, together=10)
        piece = {"type": "http.request", "body": b"12345", "more_body": True}
        await one(limit, {**piece, "more_body": False}, raises=RuntimeError)
        await one(limit, piece, {"type": "http.disconnect"})
        assert (await one(limit, piece, piece, piece))[0]["status"] == 413
        assert (await one(limit, piece))[0]["status"] == 408
        assert limit.held == 0
        limit = BodyLimit(fails, most=10, timeout=60.0, together=10)
        waiting = asyncio.create_task(one(limit, piece))
        await asyncio.sleep(0.05)
        assert limit.held == 5
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert limit.held == 0

    asyncio.run(everything())


def test_a_body_of_very_many_values_is_not_parsed(port: int) -> None:
    status, _, body = exchanged(port, post("/v1/parsed", b'{"anything": [' + b"{}," * 300 + b"{}]}", AUTH))
    assert status == 413 and "200 commas" in error_of(body)["message"]


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("depth", [500, 990, 2_000, 9_000])
def test_deep_json_is_an_error_and_no_crash(port: int, opening: bytes, closing: bytes, depth: int) -> None:
    nested = opening * depth + b"1" + closing * depth
    status, _, _ = exchanged(port, post("/v1/parsed", b'{"anything": ' + nested + b"}", AUTH))
    assert status in (200, 400, 422)
    assert exchanged(port, get("/health"))[0] == 200


# Heads.


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
    ],
)
def test_bodies_of_two_readings_are_refused_and_the_connection_ends(site: Site, port: int, head: str) -> None:
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


@pytest.mark.parametrize("request_line", ["PRI * HTTP/2.0", "GET /health HTTP/9.9", "GET /health HTTP/0.9"])
def test_other_versions_of_http_are_refused(port: int, request_line: str) -> None:
    status, _, body = exchanged(port, f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
    assert (status, error_of(body)["code"]) == (505, "bad_http")


def test_chunks_with_old_http_are_refused(port: int) -> None:
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
def test_what_is_no_http_is_told_so_in_json(port: int, dropped: list[str], noise: bytes) -> None:
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


def test_heads_within_the_limits_are_taken(port: int) -> None:
    assert exchanged(port, get("/health", *[f"X-{i}: y" for i in range(90)]))[0] == 200
    assert exchanged(port, get("/health", f"X: {'y' * 12_000}"))[0] == 200
    assert exchanged(port, get("/health", *[f"X-{i}: y" for i in range(100)]))[0] == 431
    assert exchanged(port, get("/" + "x" * 20_000))[0] in (400, 431)


def test_only_plain_json_is_taken(port: int) -> None:
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
def test_only_the_servers_own_names_are_answered(port: int, host: str, status: int) -> None:
    found = exchanged(port, get("/health", host=host))
    assert found[0] == status
    assert status == 200 or error_of(found[2])["code"] == "forbidden"


def test_which_names_a_server_has() -> None:
    assert hosts_for("0.0.0.0") is None and hosts_for("::") is None
    assert hosts_for("0.0.0.0", ["model.example.org"]) == ["model.example.org"]
    for address in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        assert "localhost" in (hosts_for(address) or [])


def test_other_pages_may_not_use_the_server_but_allowed_ones_may(site: Site, port: int) -> None:
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


def test_without_allowed_pages_there_is_no_cors() -> None:
    site = Site()
    with listening(guarded(site.app, Guards()), **uvicorn_settings(Patience())) as port:
        status, headers, _ = exchanged(port, get("/health", "Origin: https://page.example.org"))
        assert status == 403 and not any(name.startswith("access-control") for name in headers)
        assert exchanged(port, get("/v1/models", host="any.example.org"))[0] == 200


# Keys.


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization:"],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        ["Authorization: Bearer wrong"],
        [f"Authorization: {KEY}"],
        [f"Authorization: Basic {KEY}"],
        [f"Authorization: Bearer {KEY}x"],
        [f"Authorization: Bearer {KEY[:-1]}"],
        [f"Authorization: Bearer {KEY} {KEY}"],
        [f"Authorization: Bearer {KEY.upper()}"],
        [AUTH, AUTH],
        ["Authorization: Bearer \xff\xfe"],
        [f"X-Api-Key: {KEY}"],
        [f"Cookie: key={KEY}"],
    ],
)
def test_without_a_right_key_nothing_is_answered(site: Site, port: int, headers: list[str]) -> None:
    seen = len(site.bodies)
    for request in (get("/v1/models", *headers), post("/v1/echo", b"{}", *headers), get("/nowhere", *headers)):
        status, answered, body = exchanged(port, request)
        found = error_of(body)
        assert (status, found["code"], found["type"]) == (401, "invalid_api_key", "authentication_error")
        assert answered["www-authenticate"] == "bearer" and KEY.encode() not in body
    assert len(site.bodies) == seen


def test_every_key_opens_and_health_needs_none(port: int) -> None:
    for key in (KEY, "sk-the-other-key"):
        assert exchanged(port, get("/v1/models", f"authorization: bearer  {key}"))[0] == 200
    assert exchanged(port, get("/health"))[0] == 200
    for path in (
        "/health/",
        "//health",
        "/health/../v1/models",
        "/health%2f..%2fv1/models",
        "/HEALTH",
        "/v1/models?/health",
    ):
        assert exchanged(port, get(path))[0] == 401, path


def test_keys_come_from_options_file_and_environment(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the lab\n\n sk-three \nsk-four\nsk-one\n")
    found = read_keys(["sk-one"], file, {"VISMEM_API_KEY": "sk-two, sk-one"})
    assert found == ["sk-one", "sk-two", "sk-three", "sk-four"]
    assert read_keys() == [] and read_keys((), None, {"OTHER": "x"}) == []


@pytest.mark.parametrize("key", ["", " ", "two words", "schl\u00fcssel", "a\tb", "a\x7fb", "secret,\n"])
def test_keys_that_cannot_be_sent_are_refused_and_not_told(tmp_path, key: str) -> None:
    if "," in key:
        with pytest.raises(ValueError, match="VISMEM_API_KEY") as caught:
            read_keys((), None, {"VISMEM_API_KEY": key})
    else:
        with pytest.raises(ValueError, match="command line") as caught:
            read_keys([key])
    assert not key.strip() or key.strip() not in str(caught.value)
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(ValueError, match="no API key in"):
        read_keys((), tmp_path / "empty")
    with pytest.raises(ValueError, match="cannot read API keys"):
        read_keys((), tmp_path / "none")


def test_no_key_is_written_down(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        exchanged(port, get("/v1/models", AUTH))
        exchanged(port, get("/v1/models", f"Authorization: Bearer {KEY}x"))
        exchanged(port, b"GET / HTTP/1.1\r\n" + AUTH.encode() + b"\r\n\r\n")
    assert KEY not in caplog.text and KEY not in repr(GUARDS)


# Connections.


def test_a_head_that_does_not_come_ends_the_connection(port: int, dropped: list[str]) -> None:
    dropped.clear()
    with connected(port) as raw:
        assert rest(raw) == b""
    with connected(port) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        answer = rest(raw)
    assert head_of(answer)[0] == 408 and error_of(answer.partition(b"\r\n\r\n")[2])["code"] == "request_timeout"
    with connected(port) as raw:  # a header at a time, for ever
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(ConnectionError):
            for i in range(2000):
                raw.sendall(b"X-%d: y\r\n" % i)
                raw.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if not raw.recv(1):
                        break
        raw.settimeout(20)
        assert i < 1000
    assert dropped == ["slow_head"] * 3


def test_the_next_head_on_a_connection_must_come_in_time_too(port: int, dropped: list[str]) -> None:
    dropped.clear()
    with connected(port) as raw:
        raw.sendall(get("/health"))
        assert response(raw)[0] == 200
        raw.sendall(get("/health")[:20])
        answer = rest(raw)
    assert head_of(answer)[0] == 408 and dropped == ["slow_head"]
    with connected(port) as raw:  # empty lines, which HTTP lets pass before a head
        raw.sendall(get("/health"))
        assert response(raw)[0] == 200
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                raw.sendall(b"\r\n")
                raw.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if not raw.recv(1):
                        break
        assert _ < 1000


def test_an_idle_connection_is_closed_and_a_used_one_is_not(port: int, dropped: list[str]) -> None:
    dropped.clear()
    with connected(port) as raw:
        for _ in range(3):
            raw.sendall(get("/health"))
            assert response(raw)[0] == 200
        raw.sendall(get("/health") * 3)  # pipelined
        assert [response(raw)[0] for _ in range(3)] == [200] * 3
        assert rest(raw) == b""
    assert dropped == []


def test_a_long_answer_outlives_the_time_for_heads(port: int) -> None:
    with connected(port) as raw:
        raw.sendall(get("/v1/stream", AUTH))
        found = 0
        while found < 20_000_000:
            piece = raw.recv(1 << 20)
            assert piece
            found += len(piece)


def test_a_client_that_does_not_read_is_dropped_and_its_answer_cancelled(
    site: Site, port: int, dropped: list[str]
) -> None:
    dropped.clear()
    begun, ended = site.streaming, site.ended
    with connected(port, receive_buffer=4096) as raw:
        raw.sendall(get("/v1/stream", AUTH))
        until(lambda: site.streaming == begun + 1)
        until(lambda: dropped == ["slow_reader"])
    until(lambda: site.ended == site.streaming)
    assert site.ended > ended


@pytest.mark.parametrize("size", [500_000, 8_000_000])
def test_a_complete_answer_that_is_not_read_is_dropped_too(port: int, dropped: list[str], size: int) -> None:
    dropped.clear()
    with connected(port, receive_buffer=4096) as raw:
        raw.sendall(get(f"/v1/bytes/{size}", AUTH))
        until(lambda: dropped == ["slow_reader"])


def test_no_answer_that_is_not_read_keeps_its_connection_whatever_its_size() -> None:
    patience = Patience(idle=0.2, write=0.2, connections=1)
    with listening(guarded(Site().app, Guards()), **uvicorn_settings(patience)) as port:
        for size in range(60_000, 400_000, 50_000):  # all taken by the kernel, or all but a little, or not by far
            with connected(port, receive_buffer=4096) as raw:
                raw.sendall(get(f"/v1/bytes/{size}"))
                assert raw.recv(1)
                until(lambda: exchanged(port, get("/health"))[0] == 200)
            until(lambda: exchanged(port, get("/health"))[0] == 200)


def test_a_slow_reader_that_does_read_gets_everything(port: int, dropped: list[str]) -> None:
    dropped.clear()
    with connected(port, receive_buffer=65536) as raw:
        raw.sendall(get("/v1/bytes/8000000", AUTH))
        found = 0
        while found < 8_000_000:
            piece = raw.recv(40_000)
            assert piece, found
            found += len(piece)
            threading.Event().wait(0.002)
    assert dropped == []


def test_an_answer_may_rest_once_it_was_read(site: Site, port: int, dropped: list[str]) -> None:
    dropped.clear()
    site.hold = threading.Event()
    try:
        with connected(port) as raw:
            raw.sendall(get("/v1/pause", AUTH))
            found = 0
            while found < 2_000_000:
                found += len(raw.recv(65536))
            threading.Event().wait(1.5)  # three times as long as a client may read nothing
            site.hold.set()
            assert b"y" in raw.recv(65536)
    finally:
        site.hold = None
    assert dropped == []


def test_a_client_that_hangs_up_cancels_its_answer(site: Site, port: int) -> None:
    begun = site.streaming
    with connected(port) as raw:
        raw.sendall(get("/v1/stream", AUTH))
        assert raw.recv(100)
        until(lambda: site.streaming == begun + 1)
    until(lambda: site.ended == site.streaming)


def test_too_many_connections_are_turned_away_at_once_and_places_come_free(dropped: list[str]) -> None:
    dropped.clear()
    site = Site()
    patience = Patience(connections=5, dropped=dropped.append)
    with listening(guarded(site.app, Guards()), **uvicorn_settings(patience)) as port:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                raw = stack.enter_context(connected(port))
                raw.sendall(get("/health"))
                assert response(raw)[0] == 200
            for _ in range(3):
                status, headers, body = exchanged(port, get("/health"))
                assert (status, error_of(body)["code"]) == (503, "too_many_connections")
                assert headers["retry-after"] and headers["connection"] == "close"
            assert dropped == ["connections"] * 3
        until(lambda: exchanged(port, get("/health"))[0] == 200)


def test_two_hundred_connections_at_once_are_all_answered() -> None:
    site = Site()
    with (
        listening(guarded(site.app, Guards()), **uvicorn_settings(Patience())) as port,
        contextlib.ExitStack() as stack,
    ):
        open_ones = [stack.enter_context(connected(port)) for _ in range(200)]
        for raw in open_ones:
            raw.sendall(post("/v1/echo", b"x" * 1000))
        assert [response(raw)[0] for raw in open_ones] == [200] * 200


def test_a_body_in_crumbs_is_refused(site: Site, port: int, dropped: list[str]) -> None:
    dropped.clear()
    seen = len(site.bodies)
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"1\r\nx\r\n" * 20_000, AUTH, "Transfer-Encoding: chunked", length=""))
        answer = rest(raw)
    assert head_of(answer)[0] == 400 and dropped == ["bad_http"]
    assert len(site.bodies) == seen


def test_noise_within_a_refused_body_breaks_nothing(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"", "Transfer-Encoding: chunked", length=""))
        assert response(raw)[0] == 401
        raw.sendall(b"no chunk\r\n\r\n")
        assert rest(raw) == b""
    assert "Traceback" not in caplog.text and exchanged(port, get("/health"))[0] == 200


def test_a_client_that_asks_before_it_sends_is_told(site: Site, port: int) -> None:
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"", AUTH, "Expect: 100-continue", length=10))
        assert raw.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(b"x" * 10)
        assert response(raw)[0] == 200
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"", AUTH, "Expect: 100-continue", length=10**9))
        assert response(raw)[0] == 413


def test_a_websocket_is_refused(port: int) -> None:
    upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"]
    assert exchanged(port, get("/v1/models", *upgrade))[0] == 401
    closed: list[dict] = []

    async def send(message: dict) -> None:
        closed.append(message)

    asyncio.run(guarded(Site().app, Guards())({"type": "websocket", "path": "/health", "headers": []}, None, send))
    assert closed == [{"type": "websocket.close", "code": 1003}]


def test_a_server_stops_although_clients_hang_on(dropped: list[str]) -> None:
    site = Site()
    with contextlib.ExitStack() as stack:
        with listening(guarded(site.app, Guards()), **uvicorn_settings(Patience())) as port:
            silent = [stack.enter_context(connected(port)) for _ in range(5)]
            for raw in silent[1:3]:
                raw.sendall(b"GET / HTTP")
            silent[3].sendall(get("/v1/stream"))
            silent[4].sendall(post("/v1/echo", b"x", length=10))
            until(lambda: site.streaming == 1)
        assert rest(silent[0]) == b""  # `listening` has seen the server end


def test_what_is_cut_off_by_the_servers_end_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    async def never(scope, receive, send) -> None:
        if scope["path"] == "/v1/stream":
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.sleep(1000)

    with contextlib.ExitStack() as stack:
        with listening(guarded(never, Guards()), **uvicorn_settings(Patience())) as port:
            waiting, upload, stream = (stack.enter_context(connected(port)) for _ in range(3))
            waiting.sendall(get("/v1/models"))
            upload.sendall(post("/v1/echo", b"x", length=10))
            stream.sendall(get("/v1/stream"))
            while b"data: 1" not in stream.recv(65536):
                pass
        for raw in (waiting, upload):
            status, headers, body = response(raw)
            assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "5")
            assert error_of(body)["message"].startswith("the server is stopping")
            assert rest(raw) == b""
        last = rest(stream)
        assert b'data: {"error": {"message": "the server is stopping' in last and last.endswith(b"\n0\r\n\r\n")
    assert "Exception" not in caplog.text and "without" not in caplog.text


def test_sockets_of_the_test_are_loopback_only(port: int) -> None:
    with connected(port) as raw:
        assert raw.family == socket.AF_INET and raw.getpeername()[0] == "127.0.0.1"
