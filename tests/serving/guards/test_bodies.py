"""Request bodies over real sockets: too large, too slow, too deep, too many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from guarded_site import AUTH, Site
from loopback import connected, error_of, exchanged, get, post, response, rest, until

from vismem.serving.guards import BodyLimit


def test_a_body_within_the_limit_arrives_whole(site: Site, port: int) -> None:
    status, headers, body = exchanged(port, post("/v1/echo", b"x" * 100_000, AUTH))
    assert (status, json.loads(body)) == (200, {"bytes": 100_000})
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    chunked = b"".join(b"3e8\r\n" + b"x" * 1000 + b"\r\n" for _ in range(100)) + b"0\r\n\r\n"
    found = exchanged(port, post("/v1/echo", chunked, AUTH, "Transfer-Encoding: chunked", length=""))
    assert (found[0], json.loads(found[2])) == (200, {"bytes": 100_000})


def test_a_large_content_length_is_refused_before_the_body(site: Site, port: int) -> None:
    seen = len(site.bodies)
    for length in (100_001, 10**12, 10**19):
        with connected(port) as raw:
            raw.sendall(post("/v1/echo", b"", AUTH, length=length))
            status, headers, body = response(raw)
            assert (status, error_of(body)["code"]) == (413, "request_too_large")
            assert headers["connection"] == "close"
            assert rest(raw) == b""
    assert len(site.bodies) == seen


def test_a_body_with_wrong_or_missing_length_is_limited(site: Site, port: int) -> None:
    seen = len(site.bodies)
    chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    status, _, body = exchanged(port, post("/v1/echo", chunk * 50, AUTH, "Transfer-Encoding: chunked", length=""))
    assert (status, error_of(body)["code"]) == (413, "request_too_large")
    assert len(site.bodies) == seen


def test_a_refused_client_that_keeps_sending_gets_the_error(port: int) -> None:
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"", AUTH, length=5_000_000))
        raw.sendall(b"x" * 5_000_000)
        status, _, body = response(raw)
    assert status == 413 and "100000 bytes" in error_of(body)["message"]


def test_a_body_that_never_arrives_times_out(site: Site, port: int) -> None:
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


def test_a_disconnect_inside_the_body_never_reaches_the_application(site: Site, port: int) -> None:
    seen = len(site.bodies)
    with connected(port) as raw:
        raw.sendall(post("/v1/echo", b"{", AUTH, length=100))
    assert exchanged(port, get("/health"))[0] == 200
    assert len(site.bodies) == seen


def test_the_total_of_all_bodies_is_limited_and_released(site: Site, port: int) -> None:
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


def test_held_bytes_are_released_after_every_outcome() -> None:
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
        limit = BodyLimit(fails, max_body=10, timeout=0.05, max_held=10)
        piece = {"type": "http.request", "body": b"12345", "more_body": True}
        await one(limit, {**piece, "more_body": False}, raises=RuntimeError)
        await one(limit, piece, {"type": "http.disconnect"})
        assert (await one(limit, piece, piece, piece))[0]["status"] == 413
        assert (await one(limit, piece))[0]["status"] == 408
        assert limit.held == 0
        limit = BodyLimit(fails, max_body=10, timeout=60.0, max_held=10)
        waiting = asyncio.create_task(one(limit, piece))
        await asyncio.sleep(0.05)
        assert limit.held == 5
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert limit.held == 0

    asyncio.run(everything())


def test_a_body_with_too_many_values_is_not_parsed(port: int) -> None:
    status, _, body = exchanged(port, post("/v1/parsed", b'{"anything": [' + b"{}," * 300 + b"{}]}", AUTH))
    assert status == 413 and "200 commas" in error_of(body)["message"]


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("depth", [500, 990, 2_000, 9_000])
def test_deeply_nested_json_is_an_error(port: int, opening: bytes, closing: bytes, depth: int) -> None:
    nested = opening * depth + b"1" + closing * depth
    status, _, _ = exchanged(port, post("/v1/parsed", b'{"anything": ' + nested + b"}", AUTH))
    assert status in (200, 400, 422)
    assert exchanged(port, get("/health"))[0] == 200
