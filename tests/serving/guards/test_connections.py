"""Connections: slow readers and writers, too many clients, and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from guarded_site import AUTH, Site
from loopback import connected, error_of, exchanged, get, head_of, listening, post, response, rest, until

from vismem.serving.connections import ConnectionLimits, uvicorn_settings
from vismem.serving.guards import guarded


def test_slow_headers_end_the_connection(port: int, dropped: list[str]) -> None:
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


def test_the_next_request_must_arrive_in_time_too(port: int, dropped: list[str]) -> None:
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


def test_a_long_answer_outlives_the_header_timeout(port: int) -> None:
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
def test_an_unread_complete_answer_is_dropped_too(port: int, dropped: list[str], size: int) -> None:
    dropped.clear()
    with connected(port, receive_buffer=4096) as raw:
        raw.sendall(get(f"/v1/bytes/{size}", AUTH))
        until(lambda: dropped == ["slow_reader"])


def test_unread_answers_of_any_size_end_the_connection() -> None:
    limits = ConnectionLimits(idle=0.2, write=0.2, connections=1)
    with listening(guarded(Site().app), **uvicorn_settings(limits)) as port:
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


def test_a_pause_in_a_fully_read_answer_is_allowed(site: Site, port: int, dropped: list[str]) -> None:
    dropped.clear()
    site.hold = threading.Event()
    try:
        with connected(port) as raw:
            raw.sendall(get("/v1/pause", AUTH))
            found = 0
            while found < 2_000_000:  # of the body; what frames it is not counted
                found += raw.recv(65536).count(b"\0")
            threading.Event().wait(1.5)  # three times as long as a client may read nothing
            site.hold.set()
            found = b""
            while b"y" not in found:
                piece = raw.recv(65536)
                assert piece, found
                found += piece
    finally:
        site.hold = None
    assert dropped == []


def test_a_disconnect_cancels_the_answer(site: Site, port: int) -> None:
    begun = site.streaming
    with connected(port) as raw:
        raw.sendall(get("/v1/stream", AUTH))
        assert raw.recv(100)
        until(lambda: site.streaming == begun + 1)
    until(lambda: site.ended == site.streaming)


def test_excess_connections_are_rejected_until_one_closes(dropped: list[str]) -> None:
    dropped.clear()
    site = Site()
    limits = ConnectionLimits(connections=5, on_drop=dropped.append)
    with listening(guarded(site.app), **uvicorn_settings(limits)) as port:
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
        listening(guarded(site.app), **uvicorn_settings(ConnectionLimits())) as port,
        contextlib.ExitStack() as stack,
    ):
        open_ones = [stack.enter_context(connected(port)) for _ in range(200)]
        for raw in open_ones:
            raw.sendall(post("/v1/echo", b"x" * 1000))
        assert [response(raw)[0] for raw in open_ones] == [200] * 200


def test_a_body_in_tiny_chunks_is_refused(site: Site, port: int, dropped: list[str]) -> None:
    dropped.clear()
    seen = len(site.bodies)
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"1\r\nx\r\n" * 20_000, AUTH, "Transfer-Encoding: chunked", length=""))
        answer = rest(raw)
    assert head_of(answer)[0] == 400 and dropped == ["bad_http"]
    assert len(site.bodies) == seen


def test_noise_inside_a_refused_body_is_harmless(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"", "Transfer-Encoding: chunked", length=""))
        assert response(raw)[0] == 401
        raw.sendall(b"no chunk\r\n\r\n")
        assert rest(raw) == b""
    assert "Traceback" not in caplog.text and exchanged(port, get("/health"))[0] == 200


def test_expect_100_continue_is_answered(site: Site, port: int) -> None:
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

    asyncio.run(guarded(Site().app)({"type": "websocket", "path": "/health", "headers": []}, None, send))
    assert closed == [{"type": "websocket.close", "code": 1003}]


def test_the_server_stops_despite_open_connections(dropped: list[str]) -> None:
    site = Site()
    with contextlib.ExitStack() as stack:
        with listening(guarded(site.app), **uvicorn_settings(ConnectionLimits())) as port:
            silent = [stack.enter_context(connected(port)) for _ in range(5)]
            for raw in silent[1:3]:
                raw.sendall(b"GET / HTTP")
            silent[3].sendall(get("/v1/stream"))
            silent[4].sendall(post("/v1/echo", b"x", length=10))
            until(lambda: site.streaming == 1)
        assert rest(silent[0]) == b""  # `listening` has seen the server end


def test_requests_cancelled_by_a_shutdown_get_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def never(scope, receive, send) -> None:
        if scope["path"] == "/v1/stream":
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.sleep(1000)

    with contextlib.ExitStack() as stack:
        with listening(guarded(never), **uvicorn_settings(ConnectionLimits())) as port:
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
