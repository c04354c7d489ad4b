"""Several engines behind one server, each in its own process, on this machine or on a Ray cluster.

The web application stays in one process and uses a `ReplicatedEngine` like an `Engine`. Each request goes to the
replica with the fewest rows. Ray places the replicas and restarts those that die (`cluster.py`); `replica.py` is the
code that runs in them.
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

from vismem.deprecation import renamed_arguments
from vismem.loading import LoadError
from vismem.serving.cluster import Cluster
from vismem.serving.engine import EngineRequest, Event, Load, queue_full
from vismem.serving.errors import ApiError, stopping
from vismem.serving.replica import ReplicaUpdate

UNLIMITED = 10**6  # rows; the limits apply here, not in the replicas
POLL_INTERVAL = 1.0  # seconds between two queries for which replicas are running
Inbox = asyncio.Queue[ReplicaUpdate | Exception | None]
log = logging.getLogger(__name__)


class ReplicaDiedError(Exception):
    """The process that was generating an answer died."""


@dataclass(eq=False)
class ReplicaState:
    """What the server knows about a replica.

    Args:
        running: whether it was running when last polled.
        rows: rows sent to it that have not ended.
        writing: rows it last reported as being decoded.
    """

    running: bool = True
    rows: int = 0
    writing: int = 0


class ReplicatedEngine:
    """Replicas as one `ChatEngine`. `start_replicas` creates it.

    Args:
        cluster: holds the replicas.
        count: number of replicas.
        batch_size: rows that each replica decodes at the same time.
        max_waiting: further rows that may wait, per replica.
    """

    def __init__(self, cluster: Cluster, count: int, batch_size: int, max_waiting: int) -> None:
        self.cluster, self.batch_size, self.max_waiting, self.closing = cluster, batch_size, max_waiting, False
        self.replicas = [ReplicaState() for _ in range(count)]
        self.readers: set[tuple[asyncio.Future[None], Inbox]] = set()  # of running answers
        self.stopped = threading.Event()
        self.poller = threading.Thread(target=self._poll, name="vismem-replicas", daemon=True)
        self.poller.start()

    async def answer(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        """See `ChatEngine`. If a replica dies before the first event, another one answers."""
        started, tries = False, len(self.replicas) + 1
        while tries:
            tries -= 1
            replica = self._least_loaded(request.n)
            replica.rows += request.n
            try:
                async with aclosing(self._events(replica, request)) as events:
                    async for event in events:
                        started = True
                        yield event
                return
            except ReplicaDiedError as error:
                replica.running = False
                log.warning("a replica died: %s", error)
                if started or not tries:
                    raise ApiError(503, "the process generating this answer died; ask again") from error
            finally:
                replica.rows -= request.n

    def load(self) -> Load:
        """See `ChatEngine`: the sum over all replicas."""
        writing = sum(min(replica.writing, replica.rows) for replica in self.replicas)
        return Load(sum(replica.rows for replica in self.replicas) - writing, writing)

    def ready(self) -> bool:
        """See `ChatEngine`: whether any replica is running."""
        return not self.closing and any(replica.running for replica in self.replicas)

    def _least_loaded(self, rows: int) -> ReplicaState:
        """The running replica with the fewest rows."""
        if self.closing:
            raise stopping()
        running = [replica for replica in self.replicas if replica.running]
        if not running:
            raise ApiError(503, "no replica is running at the moment; try again soon", headers={"Retry-After": "5"})
        least = min(running, key=lambda replica: replica.rows)
        if rows <= self.batch_size and least.rows + rows > self.batch_size + self.max_waiting:
            raise queue_full()  # the replica itself refuses a request larger than its batch
        return least

    async def close(self, finish_within: float = 0.0) -> None:
        """See `ChatEngine`. Also ends the replicas' processes, and Ray if it was started for them."""
        if self.stopped.is_set():
            return
        self.closing = True
        end = asyncio.get_running_loop().time() + finish_within
        while self.readers and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        readers = list(self.readers)
        for reader, inbox in readers:
            inbox.put_nowait(stopping())
            reader.cancel()
        await asyncio.gather(*(reader for reader, _ in readers), return_exceptions=True)
        self.stopped.set()
        await asyncio.to_thread(self.poller.join)
        await asyncio.to_thread(self.cluster.stop)

    async def _events(self, replica: ReplicaState, request: EngineRequest) -> AsyncGenerator[Event, None]:
        inbox: Inbox = asyncio.Queue()
        reader = asyncio.ensure_future(self._read(replica, request, inbox))
        self.readers.add((reader, inbox))
        try:
            while (update := await inbox.get()) is not None:
                if isinstance(update, Exception):
                    raise update
                for event in update.events:
                    yield event
                if update.error is not None:
                    raise ApiError(**update.error)
        finally:
            self.readers.discard((reader, inbox))
            reader.cancel()

    async def _read(self, replica: ReplicaState, request: EngineRequest, inbox: Inbox) -> None:
        """Reads a replica's updates as they arrive, even if the client reads slowly."""
        from ray.exceptions import RayActorError, WorkerCrashedError
        from ray.serve.exceptions import DeploymentUnavailableError

        index, over = self.replicas.index(replica), False
        response = self.cluster.answer(index, request)
        try:
            async for update in response:
                replica.writing = update.writing
                for line in update.warnings:
                    log.warning("replica %d: %s", index, line)
                inbox.put_nowait(update)
            over = True
            inbox.put_nowait(None)
        except (RayActorError, WorkerCrashedError, DeploymentUnavailableError) as error:
            inbox.put_nowait(ReplicaDiedError(" ".join(str(error).split())))
        except Exception as error:
            inbox.put_nowait(error)
        finally:
            if not over:
                response.cancel()

    def _poll(self) -> None:
        while not self.stopped.wait(POLL_INTERVAL):
            try:
                found = self.cluster.running()
            except Exception as error:
                log.error("cannot ask Ray about the replicas: %s", error)
                found = [False] * len(self.replicas)
            for index, (replica, running) in enumerate(zip(self.replicas, found, strict=True)):
                if replica.running != running and not self.stopped.is_set():
                    log.warning("replica %d %s", index, "is running again" if running else "is down; Ray restarts it")
                replica.running = running


@renamed_arguments(most_waiting="max_waiting")
def start_replicas(
    load: dict[str, Any],
    count: int,
    address: str | None = None,
    gpus: float | None = None,
    threads: int | None = None,
    object_store: int = 512 * 2**20,
    batch_size: int = 16,
    max_waiting: int = 64,
    **engine: Any,
) -> ReplicatedEngine:
    """Loads a model into several processes and waits until all of them answer.

    Args:
        load: keywords of `vismem.loading.load_model`; folders must exist on every machine.
        count: number of replicas.
        address: of a Ray cluster, as printed by `ray start --head`, whose machines have this package installed. By
            default a cluster on this machine is started, reachable over loopback only, and ended with the engine.
        gpus: per replica, may be fractional; by default 1 if Ray has GPUs and the model's device is not "cpu".
        threads: torch threads per replica. By default this machine's cores are divided evenly; on a cluster, torch's
            default.
        object_store: bytes of shared memory of a cluster started here.
        batch_size: rows that each replica decodes at the same time.
        max_waiting: further rows that may wait, per replica.
        **engine: further keywords of `Engine`.

    Raises:
        LoadError: if Ray is not installed or not reachable, or a model cannot be loaded.
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
        # Rows are counted here, because a replica may still hold some that were just cancelled.
        settings = {**engine, "batch_size": batch_size, "max_waiting": UNLIMITED}
        cluster.deploy(load, threads, settings, count, UNLIMITED, gpus)
    except BaseException:
        cluster.stop()
        raise
    return ReplicatedEngine(cluster, count, batch_size, max_waiting)
