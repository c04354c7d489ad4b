"""One of several engines, in a process of its own: what it does there, and the messages that it sends.

Who starts such processes and asks them is `replicas.py`'s matter.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vismem.serving.engine import Ask, Engine, Event
from vismem.serving.errors import ApiError

PACE = 0.002  # seconds between two messages of a replica: many small ones keep Ray, and the server, from all else
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """What a replica sends: all that happened to an answer since the message before.

    Args:
        writing: rows that the replica is writing, of all answers.
        events: of this answer.
        error: keywords of the `ApiError` that it failed with; then it is the last message.
        notes: warnings and errors that its log got since its last message, whatever answer they are about.
    """

    writing: int
    events: list[Event]
    error: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


class Replica:
    """A model and its engine, in a process that Ray Serve keeps.

    Args:
        load: keywords of `load_model`.
        threads: torch threads, or None for torch's own choice.
        engine: keywords of `Engine`.
    """

    def __init__(self, load: dict[str, Any], threads: int | None, engine: dict[str, Any]) -> None:
        import torch
        import transformers

        from vismem.loading import load_model

        keep_to_loopback()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        self.engine = Engine(load_model(**load).model, **engine)
        self.answers = 0  # under way
        self.notes: deque[str] = deque(maxlen=100)
        logging.getLogger("vismem").addHandler(Notebook(self.notes))

    def check_health(self) -> None:
        """Called by Ray now and then, which starts another replica where this raises."""
        if not self.engine.ready():
            raise RuntimeError("the thread that owns the model has ended")

    async def answer(self, ask: Ask) -> AsyncGenerator[Message, None]:
        """An answer, as messages; Ray cancels this where the caller has gone."""
        async with aclosing(gathered(self.engine.answer(ask), lambda: PACE * self.answers)) as parts:
            self.answers += 1
            try:
                async for events, error in parts:
                    yield self._message(events, told(error))
            finally:
                self.answers -= 1

    def _message(self, events: list[Event], error: dict[str, Any] | None) -> Message:
        notes = [self.notes.popleft() for _ in range(len(self.notes))]
        return Message(self.engine.load().writing, events, error, notes)


def keep_to_loopback() -> None:
    """Before a replica answers, Ray Serve opens a port on all addresses, for a kind of calls that are not used here."""
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


class Notebook(logging.Handler):
    """Keeps what should be read where the server's log is, not in a file of Ray's."""

    def __init__(self, notes: deque[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append(self.format(record))


def told(error: Exception | None) -> dict[str, Any] | None:
    """An error as it crosses to another process: keywords of `ApiError`."""
    if error is None:
        return None
    if not isinstance(error, ApiError):
        log.error("an answer failed", exc_info=error)
        error = ApiError(500, "the server failed; its log has the reason")
    names = ("status", "message", "type", "code", "param", "headers")
    return {name: getattr(error, name) for name in names}


async def gathered(
    events: AsyncGenerator[Event, None], pause: Callable[[], float]
) -> AsyncGenerator[tuple[list[Event], Exception | None], None]:
    """The same events in lists: the first as soon as it is there, later ones with what came within a pause.

    An error of theirs comes with the last list. Closing this closes `events`.

    Args:
        events: them.
        pause: how many seconds are to pass between two lists.
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
