"""Kills a process at each of its steps on the disk: around every call that changes files, and within writes."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CALLS = ((os, ("replace", "rename", "fsync", "open", "unlink", "mkdir", "rmdir", "truncate")), (builtins, ("open",)))


def killed_at_each_step(work: Callable[[], Any], before: Callable[[], Any]) -> Iterator[int]:
    """Runs `before`, then `work` in a forked process that ends at its first step; then at its second, and so on.

    Yields after each; the last time, `work` came to its end. Nothing is flushed: a process is killed here, no machine.
    """
    step = 0
    while True:
        before()
        child = os.fork()
        if not child:
            try:
                _count(step)
                work()
            except BaseException:
                os._exit(3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9), f"the process failed with {code}"
        yield step
        if code == 0:
            return
        step += 1


def _count(most: int) -> None:
    """Ends this process once `most` steps are done."""
    done = 0

    def end() -> None:
        nonlocal done
        if done == most:
            os._exit(9)
        done += 1

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            end()
            found = real(*given, **named)
            end()
            return found

        return call

    os.fsync = lambda handle: None
    for module, names in CALLS:
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    write = Path.write_bytes

    def halves(path: Path, content: bytes) -> int:
        write(path, content[: len(content) // 2])
        end()
        return write(path, content)

    Path.write_bytes = halves  # type: ignore[method-assign]
