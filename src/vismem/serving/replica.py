"""A replica: an engine in its own process, and the updates that it sends to the server.

`replicas.py` starts replicas and sends them requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vismem.serving.engine import Engine, EngineRequest, Event
from vismem.serving.errors import ApiError, internal_error

PACE = 0.002  # seconds between updates, per running answer: many small messages would saturate Ray and the server
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaUpdate:
    """What happened to an answer since the previous update.

    Args:
        writing: rows that the replica is decoding, of all answers.
        events: of this answer.
        error: keywords of the `ApiError` that ended it; then this is the last update.
        warnings: lines of the replica's log since its previous update, whichever answer they belong to.
    """

    writing: int
    events: list[Event]
    error: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


class Replica:
    """A model and its engine, in a process managed by Ray Serve.

    Args:
        load: keywords of `load_model`.
        threads: torch threads, or None for torch's default.
        engine: keywords of `Engine`.
    """

    def __init__(self, load: dict[str, Any], threads: int | None, engine: dict[str, Any]) -> None:
        import torch
        import transformers

        from vismem.loading import load_model

        bind_to_loopback()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        self.engine = Engine(load_model(**load).model, **engine)
        self.running = 0  # answers
        self.warnings: deque[str] = deque(maxlen=100)
        logging.getLogger("vismem").addHandler(WarningBuffer(self.warnings))

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica for which this raises."""
        if not self.engine.ready():
            raise RuntimeError("the thread that owns the model has ended")

    async def answer(self, request: EngineRequest) -> AsyncGenerator[ReplicaUpdate, None]:
        """The updates of an answer. Ray cancels this when the caller is gone."""
        async with aclosing(batched_events(self.engine.answer(request), lambda: PACE * self.running)) as batches:
            self.running += 1
            try:
                async for events, error in batches:
                    warnings = [self.warnings.popleft() for _ in range(len(self.warnings))]
                    yield ReplicaUpdate(self.engine.load().writing, events, error_arguments(error), warnings)
            finally:
                self.running -= 1


def bind_to_loopback() -> None:
    """Keeps Ray Serve's gRPC port, which is not used here, from listening on all addresses."""
    from ray.serve._private import replica  # Ray 2.60.0 has no setting for this address

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


class WarningBuffer(logging.Handler):
    """Collects warnings and errors for the server's log, as Ray keeps a replica's log in a file of its own."""

    def __init__(self, lines: deque[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def error_arguments(error: Exception | None) -> dict[str, Any] | None:
    """Keywords of the `ApiError` for an exception, which can be sent to another process."""
    if error is None:
        return None
    if not isinstance(error, ApiError):
        log.error("an answer failed", exc_info=error)
        error = internal_error()
    names = ("status", "message", "type", "code", "param", "headers")
    return {name: getattr(error, name) for name in names}


async def batched_events(
    events: AsyncGenerator[Event, None], pause: Callable[[], float]
) -> AsyncGenerator[tuple[list[Event], Exception | None], None]:
    """Yields the events in lists: the first event at once, later ones together with all that arrived during a pause.

    An exception of `events` comes with the last list. Closing this generator closes `events`.

    Args:
        events: the events.
        pause: returns the seconds to wait after each list.
    """
    queue: asyncio.Queue[Event | None] = asyncio.Queue()
    failure: list[Exception] = []

    async def read() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    queue.put_nowait(event)
        except Exception as error:
            failure.append(error)
        finally:
            queue.put_nowait(None)

    reading = asyncio.ensure_future(read())
    try:
        found: list[Event | None] = []
        while None not in found:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            over = found[-1] is None
            yield [event for event in found if event is not None], failure[0] if over and failure else None
            if not over:
                await asyncio.sleep(pause())
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
