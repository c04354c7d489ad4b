"""Replicas under Ray Serve, on a cluster started by this process or on an existing one.

Ray runs without logs, dashboard and usage reports. Whoever can call Ray can run any program, so a cluster started here
listens on loopback only and requires a random token.

Private parts of Ray are used where it has no public setting, as noted beside each; tested with Ray 2.60.0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import uuid
from typing import Any

from vismem.loading import LoadError
from vismem.serving.engine import EngineRequest
from vismem.serving.replica import Replica

TOKEN = secrets.token_hex(32)  # one for all clusters of this process, because Ray reads it only once
HEALTH_INTERVAL = 2.0  # seconds between two of Ray's health checks of a replica


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
        self.methods: list[Any] = []
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
        self,
        load: dict[str, Any],
        threads: int | None,
        engine: dict[str, Any],
        count: int,
        max_requests: int,
        gpus: float | None,
    ) -> None:
        """Starts the replicas and waits until they answer.

        Args:
            load, threads, engine: arguments of `Replica`.
            count: number of replicas.
            max_requests: concurrent requests per replica.
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
            max_ongoing_requests=max_requests,
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
        self.methods = [handle.options(stream=True).answer for handle in handles]

    def answer(self, index: int, request: EngineRequest) -> Any:
        """Ray's response from a replica: an async iterator of `ReplicaUpdate`."""
        return self.methods[index].remote(request)

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
