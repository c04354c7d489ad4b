"""Listening sockets, signals and graceful shutdown.

On the first signal (Ctrl-C, SIGTERM) the server accepts no new connections, refuses new requests on open ones, and
gives running answers a while to finish. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from typing_extensions import override

from vismem.serving.connections import ConnectionLimits, uvicorn_settings

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, with a graceful shutdown that cannot hang.

    Calls `on_start` once it accepts requests, and `on_stop` on the first signal.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_start: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self.on_start, self.on_stop = on_start, on_stop
        self.loop: asyncio.AbstractEventLoop | None = None

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if self.started:
            self.on_start()

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shuts down gracefully on the first signal, at once on the second."""
        if self.should_exit:
            self.force_exit = True
            logging.disable()  # errors of aborted requests are expected
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self._abort)
        else:
            self.should_exit = True
            self.on_stop()

    def _abort(self) -> None:
        """Aborts all connections: since Python 3.12 a server closes only once there are none."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model loads so that a port in use fails early; port 0 is any free one.

    Raises:
        ValueError: if the address cannot be listened on.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ValueError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise ValueError(f"cannot listen on {host}, port {port}: {reason}") from error


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(server: Server, bound: socket.socket) -> None:
    """Serves until a signal arrives."""
    asyncio.run(server.serve(sockets=[bound]))


def config_of(app: Any, grace: float, limits: ConnectionLimits | None = None) -> uvicorn.Config:
    """uvicorn's configuration for a guarded application; on shutdown, answers have `grace` seconds to finish."""
    return uvicorn.Config(
        app,
        log_level="error",  # warnings would let clients flood the log with malformed requests
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(round(grace), 1),
        lifespan="on",
        **uvicorn_settings(limits or ConnectionLimits()),
    )
