"""Ctrl-C and SIGTERM in long runs: both stop the run, and say how to continue it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

CTRL_C, TERMINATED = 130, 143  # exit codes: 128 and the signal's number


class Interrupted(KeyboardInterrupt):
    """A run that was stopped from outside.

    Args:
        message: what stopped it, and how to continue.
        code: the exit code.
        advised: whether the message says how to continue.
    """

    def __init__(self, message: str, code: int = CTRL_C, advised: bool = False) -> None:
        super().__init__(message)
        self.code, self.advised = code, advised


@contextlib.contextmanager
def advising(advice: Callable[[], str], replace: bool = False) -> Iterator[None]:
    """Adds to an interrupt how to continue.

    Args:
        advice: called when there is an interrupt.
        replace: also where advice was given further in.
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
    """Lets SIGTERM stop what runs inside as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
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
