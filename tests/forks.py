"""Processes forked from the tests' own, so that what is imported there is not imported again."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def together(works: Sequence[Callable[[], Any]], folder: Path) -> list[tuple[int, str]]:
    """Runs each work in a process of its own, all at once; gives their exit codes and all that they printed.

    A work that ends by an exception has its traceback among what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    places = [folder / f"printed_{number}.txt" for number in range(len(works))]
    children = [_start(work, place) for work, place in zip(works, places, strict=True)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, place.read_text(errors="replace")) for code, place in zip(codes, places, strict=True)]


def _start(work: Callable[[], Any], place: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def module(name: str, *words: str, **environment: str) -> Callable[[], None]:
    """The work of `python -m name words`, with further variables in the environment."""

    def work() -> None:
        os.environ.update(environment)
        sys.argv = [name, *words]
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return work


def ranks(count: int) -> list[Mapping[str, str]]:
    """The variables that torchrun gives to each of the processes that share a work on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
