"""The disk as a process leaves it when killed at each of its steps: around calls that change files, and within writes.

No process is really killed, since each step would need one: the folder is copied at each step, and put back later. So
nothing that runs after a step, such as cleaning up after an error, shows at it. Nothing that was written is lost
either: this stands for a killed process, not for a machine that loses power.
"""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CALLS = ((os, ("replace", "rename", "fsync", "open", "unlink", "mkdir", "rmdir", "truncate")), (builtins, ("open",)))


def killed_at_each_step(work: Callable[[], Any], folder: Path, kept: Path) -> Iterator[int]:
    """Yields with the folder as `work` leaves it when killed at its first step, then at its second, and so on.

    The last time, `work` has finished.

    Args:
        work: what changes the folder.
        folder: it; need not exist yet.
        kept: a folder for the copies.
    """
    count = 0
    with pytest.MonkeyPatch.context() as patch:

        def keep() -> None:
            nonlocal count
            with pytest.MonkeyPatch.context() as real:
                for module, name, call in calls:
                    real.setattr(module, name, call)
                if folder.is_dir():
                    shutil.copytree(folder, kept / str(count))
            count += 1

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def around(*given: Any, **named: Any) -> Any:
                keep()
                found = call(*given, **named)
                keep()
                return found

            return around

        def halves(path: Path, content: bytes) -> int:
            write(path, content[: len(content) // 2])
            keep()
            return write(path, content)

        write = Path.write_bytes
        patch.setattr(os, "fsync", lambda handle: None)
        calls = [(module, name, getattr(module, name)) for module, names in CALLS for name in names]
        for module, name, call in calls:
            patch.setattr(module, name, counted(call))
        patch.setattr(Path, "write_bytes", halves)
        work()
        keep()
    for step in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        if (kept / str(step)).is_dir():
            shutil.copytree(kept / str(step), folder)
        yield step
