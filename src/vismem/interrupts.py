"""Ctrl-C and SIGTERM: both stop a long run with a message on how to resume it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

CTRL_C, TERMINATED = 130, 143  # exit codes: 128 and the signal's number


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C or a signal.

    Args:
        message: what stopped the run, and how to resume it.
        code: the exit code.
        advised: whether the message explains how to resume.
    """

    def __init__(self, message: str, code: int = CTRL_C, *, advised: bool = False) -> None:
        super().__init__(message)
        self.code, self.advised = code, advised


@contextlib.contextmanager
def advising(advice: Callable[[], str], *, replace: bool = False) -> Iterator[None]:
    """Adds advice on resuming to an interrupt.

    Args:
        advice: called only on an interrupt.
        replace: replace advice that an inner context has given.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if getattr(stop, "advised", False) and not replace:
            raise
        code = getattr(stop, "code", CTRL_C)
        what = "terminated" if code == TERMINATED else "interrupted"
        raise Interrupted(f"{what}; {advice()}", code, advised=True) from stop


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Makes SIGTERM interrupt the block as Ctrl-C does."""

    def stop(_number: int, _frame: Any) -> None:
        raise Interrupted("terminated", TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
