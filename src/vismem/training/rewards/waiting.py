"""Asynchronous rewards: what a function of `async def` gives is awaited on an event loop of its own.

The loop lives in a thread and as long as the process, so that clients which belong to a loop can be kept between
calls, and so that rewards also run where a loop is running already, as in a notebook.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from functools import cache
from typing import Any


def started(value: Any) -> Any:
    """A future of what is awaitable, which begins to run; any other value as it is."""
    return asyncio.run_coroutine_threadsafe(_awaited(value), _loop()) if inspect.isawaitable(value) else value


def finished(value: Any) -> Any:
    """The result of a future that `started` gave, once it is there; any other value as it is."""
    return value.result() if isinstance(value, Future) else value


async def _awaited(value: Awaitable[Any]) -> Any:
    try:
        return await value
    except (SystemExit, KeyboardInterrupt) as stop:  # which would end the loop; Ctrl-C reaches the main thread alone
        raise RuntimeError(f"{type(stop).__name__}: {stop}") from stop


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vismem-rewards", daemon=True).start()
    return loop
