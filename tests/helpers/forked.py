"""Processes forked from a server that has done the imports, which take seconds in a new process.

Not from the test process: neither CUDA nor autograd's threads, once in use, survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch

IMPORTED = ["torch", "transformers", "datasets", "peft", "vismem.training.run", "vismem.loading"]


class Forked:
    """A function in a process of its own; as a context, killed at the end.

    Args:
        work: runs in it, and returns its exit status.
        *given: its arguments.
        **environment: variables that only the process has.
    """

    def __init__(self, work: Callable[..., int | None], *given: Any, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)  # when the first process starts
        ours, theirs = zip(context.Pipe(duplex=False), context.Pipe(duplex=False), strict=True)
        self.process = context.Process(target=_run, args=(theirs, environment, work, given))
        self.process.start()
        for end in theirs:
            end.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in ours)
        for end in ours:
            end.close()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.stdout.close()
        self.stderr.close()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float | None = None) -> int | None:
        """Its status, or None if it still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def rest(self) -> tuple[str, str]:
        """What else it writes, to either stream, until it ends."""
        with ThreadPoolExecutor() as pool:
            out, errors = pool.map(lambda stream: stream.read(), (self.stdout, self.stderr))
        return out, errors


def run_module(name: str, *arguments: str) -> None:
    """What `python -m name arguments` runs."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def ranks(count: int) -> list[dict[str, str]]:
    """The variables that torchrun gives to each of `count` processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _run(streams: tuple[Connection, Connection], environment: dict[str, str], work: Callable, given: tuple) -> None:
    for number, end in enumerate(streams, 1):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # rebuilds torch's thread pool, before several threads race to do it
    os.environ.update(environment, TOKENIZERS_PARALLELISM="false")  # or tokenizers warns of the fork
    sys.exit(work(*given))
