"""Several engines behind one server: each in a process of its own, on this machine or on others, kept by Ray Serve.

The web application with all its guards stays one process and asks a `ReplicatedEngine` as it would an `Engine`; it
chooses the replica with the fewest rows. Ray places replicas, and starts one anew that died (`cluster.py`); what they
do is in `replica.py`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from vismem.loading import LoadError
from vismem.serving.cluster import Cluster
from vismem.serving.engine import Ask, Event, Load, full
from vismem.serving.errors import ApiError, stopping
from vismem.serving.replica import Message

ANY = 10**6  # rows that a replica refuses nothing up to
WATCH = 1.0  # seconds between two looks at which replicas run
log = logging.getLogger(__name__)


class Died(Exception):
    """The process that was to write an answer is gone."""


@dataclass(eq=False)
class Place:
    """A replica, as the server knows it.

    Args:
        running: whether it answered when it was last looked at.
        rows: that it was given and that have not ended.
        writing: those of them that it last said it was writing.
    """

    running: bool = True
    rows: int = 0
    writing: int = 0


class ReplicatedEngine:
    """Replicas as one engine; see `engine.Answering`. `start_replicas` makes one.

    Args:
        cluster: what holds the replicas.
        count: how many there are.
        batch_size: rows that each writes at a time.
        most_waiting: rows that may wait beside them, for each.
    """

    def __init__(self, cluster: Cluster, count: int, batch_size: int, most_waiting: int) -> None:
        self.cluster, self.batch_size, self.most_waiting, self.closing = cluster, batch_size, most_waiting, False
        self.places = [Place() for _ in range(count)]
        self.readings: set[tuple[asyncio.Future[None], asyncio.Queue[Any]]] = set()  # of answers under way
        self.stopped = threading.Event()
        self.watching = threading.Thread(target=self._watch, name="vismem-replicas", daemon=True)
        self.watching.start()

    async def answer(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """See `Answering`. An answer whose replica dies before anything is written is begun anew by another."""
        begun, tries = False, len(self.places) + 1
        while tries:
            tries -= 1
            place = self._place(ask.n)
            place.rows += ask.n
            try:
                async with aclosing(self._events(place, ask)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except Died as error:
                place.running = False
                log.warning("a replica died: %s", error)
                if begun or not tries:
                    raise ApiError(503, "the process that wrote this answer died; ask again") from error
            finally:
                place.rows -= ask.n

    def load(self) -> Load:
        """See `Answering`: the sum over all replicas."""
        writing = sum(min(place.writing, place.rows) for place in self.places)
        return Load(sum(place.rows for place in self.places) - writing, writing)

    def ready(self) -> bool:
        """See `Answering`: whether any replica runs."""
        return not self.closing and any(place.running for place in self.places)

    def _place(self, rows: int) -> Place:
        """The running replica with the fewest rows."""
        if self.closing:
            raise stopping()
        running = [place for place in self.places if place.running]
        if not running:
            raise ApiError(503, "no replica is running just now; try again soon", headers={"Retry-After": "5"})
        least = min(running, key=lambda place: place.rows)
        if rows <= self.batch_size and least.rows + rows > self.batch_size + self.most_waiting:
            raise full()  # what is more than any batch, the replica refuses
        return least

    async def close(self, finish_within: float = 0.0) -> None:
        """See `Answering`; the replicas' processes are ended too, and Ray's own where they were started for this."""
        if self.stopped.is_set():
            return
        self.closing = True
        end = asyncio.get_running_loop().time() + finish_within
        while self.readings and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        readings = list(self.readings)
        for reading, inbox in readings:
            inbox.put_nowait(stopping())
            reading.cancel()
        await asyncio.gather(*(reading for reading, _ in readings), return_exceptions=True)
        self.stopped.set()
        await asyncio.to_thread(self.watching.join)
        await asyncio.to_thread(self.cluster.stop)

    async def _events(self, place: Place, ask: Ask) -> AsyncGenerator[Event, None]:
        inbox: asyncio.Queue[Message | Exception | None] = asyncio.Queue()
        reading = asyncio.ensure_future(self._read(place, ask, inbox))
        self.readings.add((reading, inbox))
        try:
            while (found := await inbox.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                for event in found.events:
                    yield event
                if found.error is not None:
                    raise ApiError(**found.error)
        finally:
            self.readings.discard((reading, inbox))
            reading.cancel()

    async def _read(self, place: Place, ask: Ask, inbox: asyncio.Queue[Message | Exception | None]) -> None:
        """Takes what a replica sends as it comes, however slowly the client takes it."""
        from ray.exceptions import RayActorError, WorkerCrashedError
        from ray.serve.exceptions import DeploymentUnavailableError

        index, over = self.places.index(place), False
        response = self.cluster.answer(index, ask)
        try:
            async for message in response:
                place.writing = message.writing
                for note in message.notes:
                    log.warning("replica %d: %s", index, note)
                inbox.put_nowait(message)
            over = True
            inbox.put_nowait(None)
        except (RayActorError, WorkerCrashedError, DeploymentUnavailableError) as error:
            inbox.put_nowait(Died(" ".join(str(error).split())))
        except Exception as error:
            inbox.put_nowait(error)
        finally:
            if not over:
                response.cancel()

    def _watch(self) -> None:
        while not self.stopped.wait(WATCH):
            try:
                found = self.cluster.running()
            except Exception as error:
                log.error("cannot ask Ray about the replicas: %s", error)
                found = [False] * len(self.places)
            for index, (place, running) in enumerate(zip(self.places, found, strict=True)):
                if place.running != running and not self.stopped.is_set():
                    log.warning("replica %d %s", index, "runs again" if running else "is down; Ray starts it anew")
                place.running = running


def start_replicas(
    load: dict[str, Any],
    count: int,
    address: str | None = None,
    gpus: float | None = None,
    threads: int | None = None,
    object_store: int = 512 * 2**20,
    batch_size: int = 16,
    most_waiting: int = 64,
    **engine: Any,
) -> ReplicatedEngine:
    """Loads a model several times, each in a process of its own, and waits until all of them answer.

    Args:
        load: keywords of `vismem.loading.load_model`; names of folders must be good on every machine.
        count: replicas.
        address: of a cluster of Ray, as `ray start --head` says it, whose machines have this package too; by default
            one is started on this machine, reachable from loopback alone, and ended with the engine.
        gpus: of each replica, or parts of one; by default 1 where Ray has any and the model is not to be on "cpu".
        threads: torch threads of each replica; by default this machine's cores shared out, or torch's own choice on a
            cluster.
        object_store: bytes of shared memory for a cluster started here.
        batch_size: rows that each replica writes at a time.
        most_waiting: rows that may wait beside them, for each replica.
        **engine: further keywords of `Engine`.

    Raises:
        LoadError: if Ray is not installed, cannot be had, or a model cannot be loaded; one line.
        ValueError: if `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"there must be 1 replica or more, got {count}")
    if importlib.util.find_spec("ray") is None:
        raise LoadError("replicas need Ray Serve: pip install 'vismem[replicas]'")
    if threads is None and address is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max((os.cpu_count() or 1) // count, 1)
    cluster = Cluster(address, object_store)
    try:
        # Rows are counted here: over there, some that were just given up are still on their way out.
        settings = {**engine, "batch_size": batch_size, "most_waiting": ANY}
        cluster.deploy(load, threads, settings, count, ANY, gpus)
    except BaseException:
        cluster.stop()
        raise
    return ReplicatedEngine(cluster, count, batch_size, most_waiting)
