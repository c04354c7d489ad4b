"""The errors of rewards."""

from __future__ import annotations

import asyncio

# What foreign code may raise and still has failed: also what ends a program, a task or a generator. Not Ctrl-C.
FAILURES = (Exception, SystemExit, asyncio.CancelledError, GeneratorExit)


class RewardError(RuntimeError):
    """A reward function that failed or gave something else than rewards; names the function and the row."""


class JudgeError(RuntimeError):
    """A judge that gave no usable score."""


class RowError(Exception):
    """Says at which row of a batch a reward failed; its cause is the original error."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}")
        self.row = row
