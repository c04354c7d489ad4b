"""The paper's tables and figures, one command each, for any base and data: JSON, a Markdown table and a plot.

Every table is a function of `Runs`, which has the answers or makes them; what is written is the same each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from vismem import files
from vismem.evaluation.runs import Rehearsed, Runs
from vismem.evaluation.settings import Settings
from vismem.evaluation.tables.comparing import main, partial
from vismem.evaluation.tables.continuing import continual
from vismem.evaluation.tables.costing import latency
from vismem.evaluation.tables.layout import Table, in_terminal, write
from vismem.evaluation.tables.occasions import when
from vismem.evaluation.tables.plots import NO_PLOTS, draw
from vismem.evaluation.tables.varying import invocation, lengths, subtasks

__all__ = ["TABLES", "in_terminal", "make"]

TABLES: dict[str, Callable[[Runs], Table]] = {
    "main": main,
    "subtasks": subtasks,
    "partial": partial,
    "continual": continual,
    "invocation": invocation,
    "lengths": lengths,
    "latency": latency,
    "when": when,
}


def make(
    names: Sequence[str], settings: Settings, command: str, on_table: Callable[[Table], None] | None = None
) -> list[Path]:
    """Makes tables: trains and answers what is missing, and writes each table when it is whole.

    What all of them need - questions, rewards, tasks, packages - is looked at before the first question is asked.

    Args:
        names: of `TABLES`.
        settings: of the evaluation.
        command: to be named in the files; its first `{}` stands for the name of the table.
        on_table: called with each table when its files are written.

    Returns:
        The files.

    Raises:
        ValueError: if a table lacks what it needs; names it.
        FolderInUseError: if another run writes into the output folder.
    """
    runs, folder, found = Runs(settings), Path(settings.output_dir), []
    if find_spec("matplotlib") is None:
        raise ValueError(NO_PLOTS)
    runs.rehearsing = True
    for name in names:
        with contextlib.suppress(Rehearsed):
            TABLES[name](runs)
    runs.rehearsing = False
    with files.locked(folder):
        for name in names:
            runs.failures.clear()
            table = TABLES[name](runs)
            table.notes.extend(runs.failures_note())
            found += write(table, folder, command.replace("{}", name, 1))
            draw(table, folder / f"{name}.png")
            found.append(folder / f"{name}.png")
            if on_table:
                on_table(table)
    return found
