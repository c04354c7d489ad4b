"""A table of measurements with intervals, written atomically as JSON and Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vismem import __version__, files
from vismem.evaluation.intervals import bootstrap_average, bootstrap_share, matrix


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        row, column: its position.
        value: the mean over seeds and questions, or as the column's unit says.
        low, high: its 95 % interval, or None.
        n: number of questions (or timings) per seed.
        seeds: the value of each seed.
    """

    row: str
    column: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    seeds: list[float] = field(default_factory=list)


@dataclass
class Table:
    """Cells and their layout.

    Args:
        name: of the files.
        title: heading.
        paper: the paper's table or figure that it corresponds to.
        rows, columns: names in order; columns' names are their headers.
        cells: the measurements.
        units: formats such as `"{:.2f} s"` of columns that are not shares.
        groups: a heading over columns.
        notes: sentences below the table.
        first: header of the rows.
        extra: further data for the plot and the JSON file.
    """

    name: str
    title: str
    paper: str
    rows: list[str]
    columns: list[str]
    cells: list[Cell]
    units: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    first: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def cell(self, row: str, column: str) -> Cell | None:
        """The cell at this position, or None."""
        return next((c for c in self.cells if (c.row, c.column) == (row, column)), None)


def measured(row: str, column: str, scores: Sequence[Sequence[float]]) -> Cell:
    """The cell of scores [seeds, questions]."""
    found = matrix(scores)
    value, low, high = _rounded(*bootstrap_share(found))
    return Cell(row, column, value, low, high, found.shape[1], _rounded(*found.mean(1)))


def averaged(row: str, column: str, parts: Sequence[Sequence[Sequence[float]]]) -> Cell:
    """The cell of an unweighted average over benchmarks, each with scores [seeds, questions]."""
    found = [matrix(part) for part in parts]
    value, low, high = bootstrap_average(found)
    counts = {len(part) for part in found}
    seeds = np.mean([part.mean(1) for part in found], axis=0) if len(counts) == 1 else []
    value, low, high = _rounded(value, low, high)
    return Cell(row, column, value, low, high, sum(part.shape[1] for part in found), _rounded(*seeds))


def _rounded(*values: float) -> list[float]:
    return [round(float(value), 4) for value in values]


def write(table: Table, folder: Path, command: str) -> list[Path]:
    """Writes `NAME.json` and `NAME.md` into a folder and returns their paths."""
    versions = {"vismem": __version__, "torch": torch.__version__, "python": platform.python_version()}
    record = {"command": command, "versions": versions, **asdict(table)}
    paths = [folder / f"{table.name}.json", folder / f"{table.name}.md"]
    for path, text in zip(paths, (dumped(record), markdown(table, command)), strict=True):
        files.write_text(path, text)
    return paths


def read(path: Path) -> Table:
    """Reads a table's JSON file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    values = {each.name: record[each.name] for each in fields(Table)}
    return Table(**{**values, "cells": [Cell(**cell) for cell in record["cells"]]})


def dumped(record: dict[str, Any]) -> str:
    """JSON with one line per cell."""
    cells = ",\n".join("  " + json.dumps(cell, ensure_ascii=False) for cell in record["cells"])
    rest = {name: value for name, value in record.items() if name != "cells"}
    head = json.dumps(rest, ensure_ascii=False, indent=1)[:-2]
    return f'{head},\n "cells": [\n{cells}\n ]\n}}\n'


def markdown(table: Table, command: str) -> str:
    """The table as a Markdown page."""
    lines = [f"# {table.title}", "", f"{table.paper}. Made by `{command}`.", "", grid(table)]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def grid(table: Table) -> str:
    """The table in Markdown, shares in per cent with their interval; transposed if it has many columns."""
    lines = cells_of(table)
    if len(table.columns) > max(len(table.rows), 8):
        lines = [list(line) for line in zip(*lines, strict=True)]
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([shown[0], "|" + " --- |" * len(lines[0]), *shown[1:]])


def cells_of(table: Table) -> list[list[str]]:
    """The table's lines as text, headers first, without rows that have no cell."""
    headers = [f"{table.groups[c]}: {c}" if c in table.groups else c for c in table.columns]
    lines = [
        [row, *(shown_cell(table.cell(row, column), table.units.get(column)) for column in table.columns)]
        for row in table.rows
    ]
    return [[table.first, *headers], *(line for line in lines if any(line[1:]))]


def in_terminal(table: Table, width: int | None = None) -> str:
    """The table with its title and notes as aligned text.

    Args:
        table: the table.
        width: of the terminal; columns that do not fit continue below, with the rows' names repeated. None for
            unlimited.
    """
    lines = cells_of(table)
    if len(table.columns) > len(table.rows):
        lines = [list(line) for line in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    blocks: list[str] = []
    start = 1
    while start < len(widths) or not blocks:
        end = start + 1
        while end < len(widths) and (
            width is None or sum(widths[start : end + 1]) + 2 * (end - start + 1) + widths[0] <= width
        ):
            end += 1
        shown = [0, *range(start, min(end, len(widths)))]
        blocks.append("\n".join("  ".join(line[at].ljust(widths[at]) for at in shown).rstrip() for line in lines))
        start = end
    return "\n\n".join([table.title, *blocks, *table.notes])


def shown_cell(cell: Cell | None, unit: str | None) -> str:
    """One cell as text: `81.2 [76.0, 86.1]`."""
    if cell is None:
        return ""
    show = unit.format if unit is not None else (lambda share: f"{100 * share:.1f}")
    value = show(cell.value)
    return value if cell.low is None or cell.high is None else f"{value} [{show(cell.low)}, {show(cell.high)}]"
