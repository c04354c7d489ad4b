"""The paper's tables and figures for any base and data, as JSON, Markdown and a plot.

A table is a function of `Runs`, which loads the answers or makes them; the result is the same every time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from vismem import files
from vismem.evaluation.runs import DryRunFinishedError, Runs
from vismem.evaluation.settings import EvaluationSettings
from vismem.evaluation.tables.layout import Table, in_terminal, write
from vismem.evaluation.tables.paper import continual, invocation, latency, lengths, main, partial, subtasks, when
from vismem.evaluation.tables.plots import draw

__all__ = ["TABLES", "in_terminal", "make"]

TABLES: dict[str, Callable[[Runs], Table]] = {
    table.__name__: table for table in (main, subtasks, partial, continual, invocation, lengths, latency, when)
}


def make(
    names: Sequence[str],
    settings: EvaluationSettings,
    command: str,
    on_table: Callable[[Table], None] | None = None,
) -> list[Path]:
    """Makes tables: trains and answers what is missing, and writes each table when it is complete.

    A dry run first checks that questions, rewards, tasks and packages of all tables are available.

    Args:
        names: of `TABLES`.
        settings: of the evaluation.
        command: command to name in the files; its first `{}` is replaced by the table's name.
        on_table: called with each table after its files are written.

    Returns:
        The files.

    Raises:
        ValueError: if something that a table needs is missing.
        FolderInUseError: if another run writes into the output folder.
    """
    runs, folder, found = Runs(settings), Path(settings.output_dir), []
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'vismem[eval]'")
    runs.dry_run = True
    for name in names:
        with contextlib.suppress(DryRunFinishedError):
            TABLES[name](runs)
    runs.dry_run = False
    with files.locked(folder):
        for name in names:
            table = TABLES[name](runs)
            found += write(table, folder, command.replace("{}", name, 1))
            draw(table, folder / f"{name}.png")
            found.append(folder / f"{name}.png")
            if on_table:
                on_table(table)
    return found
