"""`vismem serve`: a model behind the interface of OpenAI's clients, for many at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vismem.bundled import POCKET
from vismem.cli.model_options import add_model_options, load
from vismem.cli.parsing import (
    MOST_TOKENS,
    Failure,
    Misuse,
    Parser,
    command_parser,
    echo,
    invocation,
    log_to_stderr,
    say,
    whole,
)
from vismem.decoding.policies import SPELLINGS

if TYPE_CHECKING:
    from starlette.types import ASGIApp

KEY_VARIABLE = "VISMEM_API_KEY"
MIB = 2**20
MOST_MEGAPIXELS = 178  # Pillow refuses more by itself


def parser() -> Parser:
    found = command_parser(
        "vismem serve",
        "Serves a model as OpenAI's chat completions are served: text and images in, streams out, and in one field\n"
        "more who may invoke memory and where it was invoked. Requests of all users share one live batch.\n"
        "Listens on this machine alone unless --host says otherwise.",
        "vismem serve --base Qwen/Qwen2.5-VL-7B-Instruct --checkpoint my-memory --port 8000",
    )
    place = found.add_argument_group("where")
    place.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    place.add_argument(
        "--port", type=whole(0, 65535), default=8000, metavar="N", help="0 is any free one (default: 8000)"
    )
    place.add_argument("--name", metavar="NAME", help="what clients call the model (default: the base's last name)")
    place.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that clients must send; can be repeated. Better out of sight: --api-key-file, or {KEY_VARIABLE}",
    )
    place.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    place.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that clients may call this server by"
    )
    place.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="a web page's origin that may ask (CORS)"
    )
    place.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images by https from there; private addresses never (default: data URIs only)",
    )
    place.add_argument(
        "--no-access-log",
        action="store_false",
        dest="access_log",
        help="do not print a line for each request: time, method, path, status, seconds, tokens",
    )
    writing = found.add_argument_group("writing")
    writing.add_argument(
        "--invocation",
        type=invocation,
        default="learned",
        metavar="POLICY",
        help=f"where a request has none: {SPELLINGS}",
    )
    writing.add_argument(
        "--batch-size", type=whole(1, 4096), default=16, metavar="N", help="rows at a time (default: 16)"
    )
    writing.add_argument(
        "--replicas",
        type=whole(1, 1024),
        default=1,
        metavar="N",
        help="models, in processes of their own, by Ray Serve",
    )
    writing.add_argument(
        "--replica-gpus", type=float, metavar="N", help="of each replica (default: one where there are any)"
    )
    writing.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a Ray cluster of several machines (default: this one)"
    )
    limits = found.add_argument_group("limits")

    def limit(name: str, low: int, default: int | None, meaning: str, unit: str = "N", high: int = 2**40) -> None:
        shown = "what the base was made for" if default is None else f"{default}"
        limits.add_argument(
            name, type=whole(low, high), default=default, metavar=unit, help=f"{meaning} (default: {shown})"
        )

    limit("--max-waiting", 0, 64, "rows that may wait; more are told 429")
    limit("--max-tokens", 1, 4096, "tokens of an answer", high=MOST_TOKENS)
    limit("--max-context", 2, None, "tokens of a prompt and its answer")
    limit("--max-body", 1, 32, "of a request", "MIB")
    limit("--max-images", 0, 8, "of a request")
    limit("--max-pixels", 1, 40, "of an image, in millions", "MPX", MOST_MEGAPIXELS)
    limit("--max-connections", 1, 512, "at a time; more are told 503")
    limit("--body-timeout", 1, 30, "for a request to arrive, and for a client to take what it was sent", "SECONDS")
    limit("--answer-timeout", 1, 300, "for an answer, waiting included; then 504", "SECONDS")
    limit("--grace", 0, 30, "for answers under way when the server is stopped", "SECONDS")
    add_model_options(found)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    if options.replica_gpus is not None and not 0 <= options.replica_gpus <= 64:
        raise Misuse(f"--replica-gpus must be from 0 to 64, got {options.replica_gpus:g}")
    if (options.replica_gpus is not None or options.ray_address) and options.replicas == 1:
        raise Misuse("--replica-gpus and --ray-address are for several models; give --replicas too")
    return options


def run(options: argparse.Namespace) -> int:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client", "httpx") if find_spec(name) is None]
    if missing:
        raise Failure(f'the server needs {missing[0]}: pip install "vismem[serve]"')
    if options.replicas > 1 and find_spec("ray") is None:
        raise Failure('replicas need Ray Serve: pip install "vismem[replicas]"')

    from vismem.serving.access import AccessLog, LineWriter
    from vismem.serving.connections import ConnectionLimits
    from vismem.serving.guards import Guards, guarded, hosts_for, is_loopback, read_keys
    from vismem.serving.lifespan import Server, address_of, config_of, listening_socket, serve
    from vismem.serving.metrics import Metrics, RequestCounter
    from vismem.serving.server import ServingConfig, application

    log_to_stderr(logging.INFO if options.debug else logging.WARNING, "%(levelname)s: %(message)s")
    keys = read_keys(options.api_key, options.api_key_file, os.environ)
    bound = listening_socket(options.host, options.port)  # before a model is loaded
    here = bound.getsockname()[0]
    engine = engine_of(options)
    metrics = Metrics(engine.load)
    name = options.name or name_of(options)
    app = application(engine, ServingConfig(name, options.invocation, options.answer_timeout, bool(keys)), metrics)
    guards = Guards(
        keys,
        hosts=hosts_for(here, options.allow_host),
        origins=options.allow_origin,
        max_body=options.max_body * MIB,
        body_timeout=options.body_timeout,
        max_held=max(8 * options.max_body, 256) * MIB,
    )
    limits = ConnectionLimits(
        write=options.body_timeout, connections=options.max_connections, on_drop=metrics.count_drop
    )
    outermost: ASGIApp = RequestCounter(guarded(app, guards), metrics)
    lines = LineWriter(sys.stdout.fileno()) if options.access_log else None
    if lines is not None:
        outermost = AccessLog(outermost, lines)
    config = config_of(outermost, options.grace, limits)
    if not keys and not is_loopback(here):
        say(f"note: without --api-key, whoever reaches {here} can ask")
    line = f"Serving {name} on {address_of(bound)}/v1 - Ctrl-C stops it"
    stop = partial(setattr, app.state, "stopping", True)
    server = Server(config, on_start=partial(echo, line), on_stop=stop)
    serve(server, bound)
    if lines is not None:
        lines.close()
    return 0


def engine_of(options: argparse.Namespace):
    """What answers: a model in this process, or replicas of it in theirs."""
    from vismem.serving.pictures import PictureLimits

    settings = {
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
    """What clients call the model: the base's or the memory's name, of a folder the last part."""
    name = options.base or options.checkpoint or POCKET
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
