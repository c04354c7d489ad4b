"""A listening server: sockets, signals, and an orderly end.

The first signal (Ctrl-C, SIGTERM) closes the door: no new connections, new requests on open ones are refused, answers
under way may finish for a while. A second one ends at once. Nothing of that hangs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from vismem.serving.connections import Patience, uvicorn_settings

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, whose signals are an orderly end and not a crash.

    Args:
        config: uvicorn's.
        on_start: called once it answers.
        on_stop: called when the first signal comes.
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if self.started:
            self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends in order, the second at once."""
        if self.should_exit:
            self.force_exit = True
            logging.disable()  # what is cut off now is no news
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self._abort)
        else:
            self.should_exit = True
            self.on_stop()

    def _abort(self) -> None:
        """Ends all connections: since Python 3.12 a server is closed only once there are none."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is found out before a model is loaded.

    Args:
        host: an address, or a name of one.
        port: 0 for any that is free.

    Raises:
        ValueError: if that cannot be; says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    found.setblocking(False)
    return found


def address_of(bound: socket.socket) -> str:
    """Where a socket can be reached, as a web address."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(server: Server, bound: socket.socket) -> None:
    """Serves until a signal comes, and then ends in order."""
    asyncio.run(server.serve(sockets=[bound]))


def config_of(app: Any, grace: float, **more: Any) -> uvicorn.Config:
    """uvicorn's settings: quiet but for what goes wrong, and with connections as in `connections.py`.

    Args:
        app: the application, with its guards.
        grace: seconds that answers under way may take when the server ends.
        **more: of `uvicorn.Config`.
    """
    return uvicorn.Config(
        app,
        log_level="error",  # a warning for each malformed request would let anyone fill the log
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(round(grace), 1),
        lifespan="on",
        **{**uvicorn_settings(Patience()), **more},
    )
