"""Serves an application on a free loopback port from a thread, and talks to it over raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

PATIENCE = 20.0  # seconds after which a test says that something never happened


@contextmanager
def listening(app: Any, **settings: Any) -> Iterator[int]:
    """The port of a server that runs as long as the context."""
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1, **settings
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        bound.close()
        assert not thread.is_alive(), "the server does not stop"


def until(holds: Callable[[], Any]) -> Any:
    """Waits for something to become true."""
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
    return found


@contextmanager
def connected(port: int, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A raw connection."""
    with contextlib.closing(socket.socket()) as raw:
        raw.settimeout(PATIENCE)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.connect(("127.0.0.1", port))
        yield raw


def rest(raw: socket.socket) -> bytes:
    """Everything received until the server ends the connection."""
    found = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := raw.recv(65536):
            found += piece
    return bytes(found)


def response(raw: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The next response on a connection that stays open: status, headers in lower case, body by Content-Length."""
    found = bytearray()
    while b"\r\n\r\n" not in found:
        piece = raw.recv(1)
        assert piece, f"the connection ended after {bytes(found)!r}"
        found += piece
    status, headers = head_of(bytes(found))
    body, length = bytearray(), int(headers.get("content-length", 0))
    while len(body) < length:
        piece = raw.recv(length - len(body))
        assert piece, "the connection ended within a body"
        body += piece
    return status, headers, bytes(body)


def head_of(answer: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    lines = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers


def exchanged(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """The response to some bytes on a connection of their own."""
    with connected(port) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(request)
        return response(raw)


def error_of(body: bytes) -> dict[str, Any]:
    """OpenAI's error object, with its format checked."""
    found = json.loads(body)
    assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}, found
    assert found["error"]["message"] and "\n" not in found["error"]["message"]
    return found["error"]


def post(path: str, body: bytes, *headers: str, length: int | str | None = None) -> bytes:
    """A POST as bytes; `length` None sends the true one, "" sends none."""
    lines = [f"POST {path} HTTP/1.1", *headers]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.append("Host: localhost")
    if not any(line.lower().startswith("content-type:") for line in headers):
        lines.append("Content-Type: application/json")
    if length != "":
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(path: str, *headers: str, host: str = "localhost") -> bytes:
    """A GET as bytes."""
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode("latin-1")
