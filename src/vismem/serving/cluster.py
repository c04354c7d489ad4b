"""Ray, as it is needed here: a cluster of this process alone or one that there is, with replicas under Ray Serve on it.

Quiet, without its dashboard, without reports of its use to anybody; a cluster started here is on loopback alone and
takes calls with its own token only, since whoever may call Ray may run programs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import uuid
from typing import Any

from vismem.loading import LoadError
from vismem.serving.engine import Ask
from vismem.serving.replica import Replica

TOKEN = secrets.token_hex(32)  # of clusters started by this process, since Ray reads it once
HEALTH = 2.0  # seconds between two checks of a replica by Ray


class Cluster:
    """Replicas under Ray Serve, each an application of its own, so that the server chooses which one is asked.

    Args:
        address: of a cluster of Ray; None starts one here, which ends with `stop`.
        object_store: bytes of shared memory for requests on their way, for a cluster started here.

    Raises:
        LoadError: if there is no such cluster, or one started here could be reached from elsewhere.
    """

    def __init__(self, address: str | None, object_store: int) -> None:
        self.ours, self.name = address is None, f"vismem-{uuid.uuid4().hex[:8]}"
        self.apps: list[str] = []
        self.methods: list[Any] = []
        self.folder = tempfile.mkdtemp(prefix="vismem-ray-") if self.ours else None
        environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
        if self.ours:
            # The first is Ray's way for systems where it knows no clusters: all is on loopback.
            environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        self.before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._connect(address, object_store)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            self._end()
            told = " ".join(str(error).split())
            raise LoadError(f"cannot use Ray at {address or 'this machine'}: {told}") from error

    def _connect(self, address: str | None, object_store: int) -> None:
        import ray
        import ray.serve
        from ray._private import ray_constants
        from ray._raylet import Config

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # after its import, which sets it
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "vismem"}
        if address is not None:
            host, _, port = address.rpartition(":")
            if port.isdigit() and "/" not in host:  # Ray itself would try for more than a minute
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            ray.init(address, **common)
            return
        ray_constants.ENABLE_RAY_CLUSTER = False  # these two if Ray was imported before
        Config.initialize("")
        ray.init("local", include_dashboard=False, object_store_memory=object_store, _temp_dir=self.folder, **common)
        where = ray.util.get_node_ip_address()
        if where != "127.0.0.1":
            raise RuntimeError(f"this Ray listens on {where} and not on loopback alone")

    def deploy(
        self,
        load: dict[str, Any],
        threads: int | None,
        engine: dict[str, Any],
        count: int,
        most: int,
        gpus: float | None,
    ) -> None:
        """Starts the replicas and waits until they answer.

        Args:
            load, threads, engine: of `Replica`.
            count: replicas.
            most: requests at a time that each lets in.
            gpus: of each; None for 1 where there are any.

        Raises:
            LoadError: if there are too few GPUs, or one of them cannot load its model.
        """
        import ray
        from ray import serve
        from ray.serve.schema import LoggingConfig

        there = ray.cluster_resources().get("GPU", 0.0)
        if gpus is None:
            gpus = float(there > 0 and load.get("device") != "cpu")
        if gpus * count > there:
            raise LoadError(f"{count} replicas with {gpus:g} GPUs each need more than the {there:g} that Ray has")
        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = serve.deployment(
            Replica,
            name="Replica",
            ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
            max_ongoing_requests=most,
            health_check_period_s=HEALTH,
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
            raise LoadError(f"a replica does not come up: {self._reason() or error}") from error
        self.methods = [handle.options(stream=True).answer for handle in handles]

    def answer(self, index: int, ask: Ask) -> Any:
        """Ray's response of one of the replicas, an iterator of messages."""
        return self.methods[index].remote(ask)

    def running(self) -> list[bool]:
        """Which replicas answer."""
        import ray
        from ray import serve

        if not ray.is_initialized():  # or Ray Serve would start a cluster, with settings of its own
            return [False] * len(self.apps)
        apps = serve.status().applications
        return [app in apps and apps[app].status == "RUNNING" for app in self.apps]

    def stop(self) -> None:
        """Ends the replicas, and Ray where it was started for them."""
        from ray import serve

        if not self.ours:
            for app in self.apps:
                with contextlib.suppress(Exception):  # what is gone already need not be ended
                    serve.delete(app)
        self._end()

    def _end(self) -> None:
        import ray

        ray.shutdown()
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _reason(self) -> str:
        """Why a replica does not come up: the last of the lines that Ray Serve has which names an error."""
        from ray import serve

        apps = serve.status().applications
        said = "\n".join(each.message for app in self.apps if app in apps for each in apps[app].deployments.values())
        lines = [line.strip() for line in said.splitlines()]
        return next((line for line in reversed(lines) if ": " in line and " " not in line.split(": ")[0]), "")
