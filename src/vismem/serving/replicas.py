"""Several engines behind one server, each in its own process, under Ray Serve on this machine or on a Ray cluster.

The web application stays in one process and uses a `ReplicatedEngine` like an `Engine`. Each request goes to the
replica with the fewest rows; Ray places the replicas and restarts those that die.

Ray runs without logs, dashboard and usage reports. Whoever can call Ray can run any program, so a cluster started here
listens on loopback only and requires a random token. Private parts of Ray are used where it has no public setting, as
noted beside each; tested with Ray 2.60.0.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import logging.handlers
import os
import secrets
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from vismem.deprecation import renamed_arguments
from vismem.loading import LoadError
from vismem.serving.engine import Engine, Load, queue_full
from vismem.serving.errors import ApiError, internal_error, stopping
from vismem.serving.protocol import ChatChunk, ChatRequest

T = TypeVar("T")
TOKEN = secrets.token_hex(32)  # one for all clusters of this process, because Ray reads it only once
HEALTH_INTERVAL = 2.0  # seconds between two of Ray's health checks of a replica
POLL_INTERVAL = 1.0  # seconds between two queries for which replicas are running
PACE = 0.002  # seconds between updates, per running answer: many small messages would saturate Ray and the server
UNLIMITED = 10**6  # rows; the limits apply in the server, not in the replicas
log = logging.getLogger(__name__)


# In a replica's process.


@dataclass(frozen=True)
class ReplicaUpdate:
    """What happened to an answer since the previous update."""

    writing: int  # rows that the replica is decoding, over all answers
    chunks: list[ChatChunk]
    error: ApiError | None  # what ended it; then this is the last update
    warnings: list[str]  # lines of the replica's log since its previous update, whichever answer they belong to


class Replica:
    """A model and its engine, in a process managed by Ray Serve. The arguments are those of `Cluster.deploy`."""

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
        self.warnings = logging.handlers.BufferingHandler(100)  # Ray keeps a replica's log in its own file
        self.warnings.setLevel(logging.WARNING)
        logging.getLogger("vismem").addHandler(self.warnings)

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica if this raises."""
        if not self.engine.ready():
            raise RuntimeError("the thread that owns the model has ended")

    async def answer(self, request: ChatRequest) -> AsyncGenerator[ReplicaUpdate, None]:
        """The updates of an answer. Ray cancels this when the caller is gone."""
        self.running += 1
        try:
            async with aclosing(batched(self.engine.answer(request), lambda: PACE * self.running)) as batches:
                async for chunks, error in batches:
                    if error is not None and not isinstance(error, ApiError):
                        log.error("an answer failed", exc_info=error)
                        error = internal_error()
                    records, self.warnings.buffer = self.warnings.buffer, []
                    warnings = [self.warnings.format(record) for record in records]
                    yield ReplicaUpdate(self.engine.load().writing, chunks, error, warnings)
        finally:
            self.running -= 1


def bind_to_loopback() -> None:
    """Keeps Ray Serve's gRPC port, which is not used here, from listening on all addresses."""
    from ray.serve._private import replica  # Ray 2.60.0 has no setting for this address

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


async def batched(
    items: AsyncGenerator[T, None], pause: Callable[[], float]
) -> AsyncGenerator[tuple[list[T], BaseException | None], None]:
    """Yields the items in lists: the first item at once, later ones together with all that arrived during a pause.

    Each list comes with None, the last one with the exception that ended `items`, if any. Closing this generator closes
    `items`. `pause` returns seconds.
    """
    queue: asyncio.Queue[T | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    queue.put_nowait(item)
        finally:
            queue.put_nowait(None)

    reading = asyncio.ensure_future(read())
    try:
        last = False
        while not last:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            last = found[-1] is None
            yield [item for item in found if item is not None], reading.exception() if last else None
            if not last:
                await asyncio.sleep(pause())
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


# In the server's process.


class Cluster:
    """Replicas, each its own Ray Serve application, so that the server chooses the replica for a request.

    Args:
        address: of a Ray cluster; None starts one here, which `stop` ends.
        object_store: bytes of shared memory of a cluster started here.

    Raises:
        LoadError: if the cluster cannot be reached, or one started here listens on more than loopback.
    """

    def __init__(self, address: str | None, object_store: int) -> None:
        self.local, self.name = address is None, f"vismem-{uuid.uuid4().hex[:8]}"
        self.apps: list[str] = []
        self.lock = threading.Lock()
        self.methods: list[Any] = []  # one per replica; each returns an async iterator of `ReplicaUpdate`
        self.folder = tempfile.mkdtemp(prefix="vismem-ray-") if self.local else None
        environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
        if self.local:
            # On systems without cluster support, which this variable simulates, Ray listens on loopback only.
            environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        self.environment_before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._connect(address, object_store)
        except Exception as error:  # a start that times out raises a bare Exception
            self._end()
            reason = " ".join(str(error).split())
            raise LoadError(f"cannot use Ray at {address or 'this machine'}: {reason}") from error

    def _connect(self, address: str | None, object_store: int) -> None:
        import ray
        import ray.serve
        from ray._private import auto_init_hook, ray_constants  # Ray 2.60.0 reads the environment only at import
        from ray._raylet import Config  # the same

        auto_init_hook.enable_auto_connect = False  # or a call that comes after `stop` starts another cluster
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the import above sets another level
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "vismem"}
        if address is not None:
            host, _, port = address.rpartition(":")
            if port.isdigit() and "/" not in host:  # ray.init would retry for more than a minute
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            ray.init(address, **common)
            return
        ray_constants.ENABLE_RAY_CLUSTER = False  # these two lines: in case Ray was imported before
        Config.initialize("")
        ray.init("local", include_dashboard=False, object_store_memory=object_store, _temp_dir=self.folder, **common)
        host = ray.util.get_node_ip_address()
        if host != "127.0.0.1":
            raise RuntimeError(f"Ray listens on {host} instead of loopback")

    def deploy(
        self, load: dict[str, Any], threads: int | None, engine: dict[str, Any], count: int, gpus: float | None
    ) -> None:
        """Starts the replicas and waits until they answer.

        Args:
            load: keywords of `load_model`.
            threads: torch threads of each, or None for torch's default.
            engine: keywords of `Engine`.
            count: number of replicas.
            gpus: per replica; None for 1 if there are any.

        Raises:
            LoadError: if there are too few GPUs, or a replica cannot load its model.
        """
        import ray
        from ray import serve
        from ray.serve.schema import LoggingConfig

        available = ray.cluster_resources().get("GPU", 0.0)
        if gpus is None:
            gpus = float(available > 0 and load.get("device") != "cpu")
        if gpus * count > available:
            raise LoadError(f"{count} replicas with {gpus:g} GPUs each need more than the {available:g} that Ray has")
        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = serve.deployment(
            Replica,
            name="Replica",
            ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
            max_ongoing_requests=UNLIMITED,
            health_check_period_s=HEALTH_INTERVAL,
            health_check_timeout_s=30,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=2,
            max_constructor_retry_count=1,
            logging_config=quiet,
        )
        self.apps = [f"{self.name}-{index}" for index in range(count)]
        targets = [
            serve.RunTarget(deployment.bind(load, threads, engine), name=app, route_prefix=None) for app in self.apps
        ]
        try:
            handles = serve.run_many(targets)
        except RuntimeError as error:
            raise LoadError(f"a replica failed to start: {self._reason() or error}") from error
        self.methods = [handle.options(stream=True).answer.remote for handle in handles]

    def running(self) -> list[bool]:
        """Which replicas are running."""
        import ray
        from ray import serve

        with self.lock:
            if not ray.is_initialized():  # serve.status would start a cluster with default settings
                return [False] * len(self.apps)
            apps = serve.status().applications
        return [app in apps and apps[app].status == "RUNNING" for app in self.apps]

    def stop(self) -> None:
        """Ends the replicas, and Ray if it was started for them."""
        from ray import serve

        if not self.local:
            for app in self.apps:
                with contextlib.suppress(Exception):  # the application may be gone already
                    serve.delete(app)
        self._end()

    def _end(self) -> None:
        import ray

        with self.lock:  # not between a check that Ray runs and the call that needs it
            ray.shutdown()
        for name, value in self.environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _reason(self) -> str:
        """Why a replica failed to start: the last line of Ray Serve's messages that names an exception."""
        from ray import serve

        apps = serve.status().applications
        deployments = [each for app in self.apps if app in apps for each in apps[app].deployments.values()]
        lines = [line.strip() for each in deployments for line in each.message.splitlines()]
        return next((line for line in reversed(lines) if ": " in line and " " not in line.split(": ")[0]), "")


@dataclass(eq=False)
class ReplicaState:
    """What the server knows about a replica."""

    running: bool = True  # when last polled
    rows: int = 0  # sent to it and not finished
    writing: int = 0  # rows that it last reported as being decoded


class ReplicatedEngine:
    """Replicas as one `ChatEngine`. `start_replicas` creates it, and describes the arguments."""

    def __init__(self, cluster: Cluster, batch_size: int, max_waiting: int) -> None:
        self.cluster, self.batch_size, self.max_waiting, self.closing = cluster, batch_size, max_waiting, False
        self.replicas = [ReplicaState() for _ in cluster.apps]
        self.readers: set[asyncio.Future[None]] = set()  # of running answers
        self.stopped = threading.Event()
        self.poller = threading.Thread(target=self._poll, name="vismem-replicas", daemon=True)
        self.poller.start()

    async def answer(self, request: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
        """See `ChatEngine`. If a replica dies before the first chunk, another one answers."""
        from ray.exceptions import RayActorError, WorkerCrashedError
        from ray.serve.exceptions import DeploymentUnavailableError

        started, rows = False, request.n
        for attempts_left in reversed(range(len(self.replicas) + 1)):
            replica = self._least_loaded(rows)
            replica.rows += rows
            try:
                async with aclosing(self._updates(replica, request)) as updates:
                    async for update in updates:
                        for chunk in update.chunks:
                            started = True
                            yield chunk
                        if update.error is not None:
                            raise update.error
                return
            except (RayActorError, WorkerCrashedError, DeploymentUnavailableError) as error:
                replica.running = False
                log.warning("a replica died: %s", " ".join(str(error).split()))
                if started or not attempts_left:
                    raise ApiError(503, "the process generating this answer died; ask again") from error
            finally:
                replica.rows -= rows

    def load(self) -> Load:
        """See `ChatEngine`: the sum over all replicas."""
        writing = sum(min(replica.writing, replica.rows) for replica in self.replicas)
        return Load(sum(replica.rows for replica in self.replicas) - writing, writing)

    def ready(self) -> bool:
        """See `ChatEngine`: whether any replica is running."""
        return not self.closing and any(replica.running for replica in self.replicas)

    async def close(self, finish_within: float = 0.0) -> None:
        """See `ChatEngine`. Also ends the replicas' processes, and Ray if it was started for them."""
        if self.stopped.is_set():
            return
        self.closing = True
        if self.readers:
            await asyncio.wait(self.readers, timeout=finish_within)
        for reader in self.readers:
            reader.cancel()
        await asyncio.gather(*self.readers, return_exceptions=True)
        self.stopped.set()
        await asyncio.to_thread(self.poller.join)
        await asyncio.to_thread(self.cluster.stop)

    def _least_loaded(self, rows: int) -> ReplicaState:
        """The running replica with the fewest rows."""
        if self.closing:
            raise stopping()
        running = [replica for replica in self.replicas if replica.running]
        if not running:
            raise ApiError(503, "no replica is running at the moment; try again soon")
        least = min(running, key=lambda replica: replica.rows)
        if rows <= self.batch_size and least.rows + rows > self.batch_size + self.max_waiting:
            raise queue_full()  # the replica itself refuses a request larger than its batch
        return least

    async def _updates(self, replica: ReplicaState, request: ChatRequest) -> AsyncGenerator[ReplicaUpdate, None]:
        """A replica's updates, read as they arrive even if the client reads slowly."""
        index, inbox = self.replicas.index(replica), asyncio.Queue[ReplicaUpdate | None]()

        async def read() -> None:
            over, response = False, self.cluster.methods[index](request)
            try:
                async for update in response:
                    replica.writing = update.writing
                    for line in update.warnings:
                        log.warning("replica %d: %s", index, line)
                    inbox.put_nowait(update)
                over = True
            finally:
                inbox.put_nowait(None)
                if not over:
                    response.cancel()

        reader = asyncio.ensure_future(read())
        self.readers.add(reader)
        reader.add_done_callback(self.readers.discard)
        try:
            while (update := await inbox.get()) is not None:
                yield update
            if reader.cancelled():
                raise stopping()
            reader.result()  # raises what ended it
        finally:
            reader.cancel()

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
        cluster.deploy(load, threads, {**engine, "batch_size": batch_size, "max_waiting": UNLIMITED}, count, gpus)
    except BaseException:
        cluster.stop()
        raise
    return ReplicatedEngine(cluster, batch_size, max_waiting)
