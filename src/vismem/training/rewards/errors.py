"""Errors of rewards."""

from __future__ import annotations

import asyncio

# What counts as a failure of third-party code, including exits of a program, task or generator, but not Ctrl-C.
FAILURES = (Exception, SystemExit, asyncio.CancelledError, GeneratorExit)


class RewardError(RuntimeError):
    """A reward function failed or returned an invalid value; names the function and the row."""


class JudgeError(RuntimeError):
    """A judge gave no usable score."""


class RowError(Exception):
    """A reward failed at a row of the batch; the cause is the original error."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}")
        self.row = row
