"""`vismem serve`: an HTTP server with OpenAI's chat completions API."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismem.bundled import POCKET
from vismem.cli.model_options import add_model_options, load
from vismem.cli.parsing import (
    MAX_TOKENS,
    CommandError,
    Parser,
    UsageError,
    command_parser,
    echo,
    invocation_policy,
    log_to_stderr,
    say,
    whole,
)
from vismem.decoding.policies import SPELLINGS

if TYPE_CHECKING:
    from vismem.serving.engine import ChatEngine

KEY_VARIABLE = "VISMEM_API_KEY"
MIB = 2**20
MAX_MEGAPIXELS = 178  # Pillow's own limit


def parser() -> Parser:
    found = command_parser(
        "vismem serve",
        "Serves a model with OpenAI's chat completions API: text and images in, streams out. One extra field sets the\n"
        "invocation policy and reports invocations. Requests of all clients share one live batch.\n"
        "Listens on this machine only, unless --host is given.",
        "vismem serve --base Qwen/Qwen2.5-VL-7B-Instruct --checkpoint my-memory --port 8000",
    )
    add = found.add_argument_group("address and access").add_argument
    repeatable: dict[str, Any] = {"action": "append", "default": []}
    port_help = "port to listen on, 0 for any free one (default: 8000)"
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=whole(0, 65535), default=8000, metavar="N", help=port_help)
    add("--name", metavar="NAME", help="the model's name for clients (default: last part of the base's name)")
    add(
        "--api-key",
        **repeatable,
        metavar="KEY",
        help="a key that clients must send; repeatable. Other users of the machine may see it: prefer --api-key-file "
        f"or {KEY_VARIABLE}",
    )
    add("--api-key-file", type=Path, metavar="FILE", help="file of keys, one per line")
    add("--allow-host", **repeatable, metavar="NAME", help="a host name to accept in requests")
    add("--allow-origin", **repeatable, metavar="URL", help="an origin whose web pages may send requests (CORS)")
    add(
        "--allow-image-host",
        **repeatable,
        metavar="HOST",
        help="a host to fetch images from over https, never at private addresses (default: data URIs only)",
    )
    add(
        "--no-access-log",
        action="store_false",
        dest="access_log",
        help="do not log requests (time, method, path, status, seconds, tokens)",
    )
    add = found.add_argument_group("decoding").add_argument
    policy_help = f"default for requests without one: {SPELLINGS}"
    add("--invocation", type=invocation_policy, default="learned", metavar="POLICY", help=policy_help)
    add("--batch-size", type=whole(1, 4096), default=16, metavar="N", help="rows decoded at a time (default: 16)")
    add(
        "--replicas",
        type=whole(1, 1024),
        default=1,
        metavar="N",
        help="number of model processes, run by Ray Serve (default: 1, without Ray)",
    )
    add("--replica-gpus", type=float, metavar="N", help="GPUs per replica (default: 1 if there are any)")
    add("--ray-address", metavar="ADDRESS", help="address of a Ray cluster (default: this machine)")
    limits = found.add_argument_group("limits")

    def limit(name: str, low: int, default: int | None, meaning: str, unit: str = "N", high: int = 2**40) -> None:
        shown = "the base's" if default is None else f"{default}"
        limits.add_argument(
            name, type=whole(low, high), default=default, metavar=unit, help=f"{meaning} (default: {shown})"
        )

    limit("--max-waiting", 0, 64, "rows that may wait; more get status 429")
    limit("--max-tokens", 1, 4096, "tokens per answer", high=MAX_TOKENS)
    limit("--max-context", 2, None, "tokens of a prompt with its answer")
    limit("--max-body", 1, 32, "size of a request", "MIB")
    limit("--max-images", 0, 8, "images per request")
    limit("--max-pixels", 1, 40, "pixels per image, in millions", "MPX", MAX_MEGAPIXELS)
    limit("--max-connections", 1, 512, "connections at a time; more get status 503")
    limit("--body-timeout", 1, 30, "time for a client to send a request, and to receive its answer", "SECONDS")
    limit("--answer-timeout", 1, 300, "time per answer, including waiting; then status 504", "SECONDS")
    limit("--grace", 0, 30, "time for running answers to finish when the server stops", "SECONDS")
    add_model_options(found)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    if options.replica_gpus is not None and not 0 <= options.replica_gpus <= 64:
        raise UsageError(f"--replica-gpus must be from 0 to 64, got {options.replica_gpus:g}")
    if (options.replica_gpus is not None or options.ray_address) and options.replicas == 1:
        raise UsageError("--replica-gpus and --ray-address need several models: give --replicas too")
    return options


def run(options: argparse.Namespace) -> int:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client", "httpx") if find_spec(name) is None]
    if missing:
        raise CommandError(f'the server needs {missing[0]}: pip install "vismem[serve]"')
    if options.replicas > 1 and find_spec("ray") is None:
        raise CommandError('replicas need Ray Serve: pip install "vismem[replicas]"')

    from vismem.serving.access import LineWriter, RequestLog
    from vismem.serving.connections import ConnectionLimits
    from vismem.serving.guards import guarded, hosts_for, is_loopback, read_keys
    from vismem.serving.lifespan import Server, address_of, config_of, listening_socket, serve
    from vismem.serving.metrics import Metrics
    from vismem.serving.server import ServingConfig, application

    log_to_stderr(logging.INFO if options.debug else logging.WARNING, "%(levelname)s: %(message)s")
    keys = read_keys(options.api_key, options.api_key_file, os.environ)
    bound = listening_socket(options.host, options.port)  # fails before the model is loaded
    here = bound.getsockname()[0]
    engine = engine_of(options)
    metrics = Metrics(engine.load)
    name = options.name or name_of(options)
    app = application(engine, ServingConfig(name, options.invocation, options.answer_timeout, bool(keys)), metrics)
    safe = guarded(
        app,
        keys=keys,
        hosts=hosts_for(here, options.allow_host),
        origins=options.allow_origin,
        max_body=options.max_body * MIB,
        body_timeout=options.body_timeout,
        max_held=max(8 * options.max_body, 256) * MIB,
    )
    limits = ConnectionLimits(
        write=options.body_timeout, connections=options.max_connections, on_drop=metrics.count_drop
    )
    lines = LineWriter(sys.stdout.fileno()) if options.access_log else None
    config = config_of(RequestLog(safe, metrics, lines), options.grace, limits)
    if not keys and not is_loopback(here):
        say(f"note: without --api-key, anyone who can reach {here} can use the server")
    line = f"Serving {name} on {address_of(bound)}/v1 - Ctrl-C stops it"
    stop = partial(setattr, app.state, "stopping", True)
    server = Server(config, on_start=partial(echo, line), on_stop=stop)
    serve(server, bound)
    if lines is not None:
        lines.close()
    return 0


def engine_of(options: argparse.Namespace) -> ChatEngine:
    """A model in this process, or replicas in others."""
    from vismem.serving.pictures import PictureLimits

    settings: dict[str, Any] = {
        "batch_size": options.batch_size,
        "max_waiting": options.max_waiting,
        "context": options.max_context,
        "max_tokens": options.max_tokens,
        "pictures": PictureLimits(
            count=options.max_images,
            size=options.max_body * MIB,
            total_size=max(options.max_body, 64) * MIB,
            pixels=options.max_pixels * 10**6,
            total_pixels=2 * options.max_pixels * 10**6,
            hosts=tuple(options.allow_image_host),
        ),
    }
    if options.replicas > 1:
        from vismem.serving.replicas import start_replicas

        model = {
            name: getattr(options, name) for name in ("checkpoint", "base", "device", "dtype", "trust_remote_code")
        }
        say(f"starting {options.replicas} replicas")
        return start_replicas(model, options.replicas, options.ray_address, options.replica_gpus, **settings)

    from vismem.serving.engine import Engine

    return Engine(load(options).model, **settings)


def name_of(options: argparse.Namespace) -> str:
    """The model's name for clients: the base's or the memory's, of a folder only the last part."""
    name = options.base or options.checkpoint or POCKET
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
