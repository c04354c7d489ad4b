"""A table of measurements: cells with intervals, written as JSON and as Markdown; both are whole or not there."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vismem import __version__, files
from vismem.evaluation.intervals import bootstrap_average, bootstrap_mean, matrix, wilson


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        row, column: where it stands.
        value: the mean over seeds and questions, or whatever the column's unit says.
        low, high: its 95 % interval; None where there is none.
        n: questions (or timings) per seed.
        seeds: each seed's own value.
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
    """Cells and how they are shown.

    Args:
        name: of the files.
        title: the question that it answers.
        paper: the table or figure of the paper that it stands for.
        rows, columns: their order; the columns' header is their name.
        cells: the measurements.
        units: of columns that are not shares: a format such as `"{:.2f} s"`.
        groups: a heading over columns.
        notes: sentences below it.
        first: header of the rows.
        extra: further numbers, for the plot and for the JSON file.
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
        """The cell at that place."""
        return next((c for c in self.cells if (c.row, c.column) == (row, column)), None)


def measured(row: str, column: str, scores: Sequence[Sequence[float]]) -> Cell:
    """The cell of scores [seeds, questions]."""
    found = matrix(scores)
    value, low, high = bootstrap_mean(found)
    if found.min() >= 0 and found.max() <= 1:  # a share: at least the width that so many questions have
        least = wilson(value, found.shape[1])
        low, high = min(low, least[0]), max(high, least[1])
    return Cell(row, column, *_rounded(value, low, high), found.shape[1], _rounded(*found.mean(1)))


def averaged(row: str, column: str, parts: Sequence[Sequence[Sequence[float]]]) -> Cell:
    """The cell of an unweighted average over benchmarks, each with scores [seeds, questions]."""
    found = [matrix(part) for part in parts]
    value, low, high = bootstrap_average(found)
    counts = {len(part) for part in found}
    seeds = (
        [sum(part[i].mean() for part in found) / len(found) for i in range(counts.pop())] if len(counts) == 1 else []
    )
    return Cell(row, column, *_rounded(value, low, high), sum(part.shape[1] for part in found), _rounded(*seeds))


def _rounded(*values: float) -> list[float]:
    return [round(float(value), 4) for value in values]


def write(table: Table, folder: Path, command: str) -> list[Path]:
    """Writes `NAME.json` and `NAME.md` into a folder; returns their paths."""
    versions = {"vismem": __version__, "torch": torch.__version__, "python": platform.python_version()}
    record = {"command": command, "versions": versions, **asdict(table)}
    texts = {".json": dumped(record), ".md": markdown(table, command)}
    found = []
    for ending, text in texts.items():
        path = folder / f"{table.name}{ending}"
        files.write_text(path, text)
        found.append(path)
    return found


def read(path: Path) -> Table:
    """A table that `write` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    values = {name: record[name] for name in (each.name for each in fields(Table))}
    return Table(**{**values, "cells": [Cell(**cell) for cell in record["cells"]]})


def dumped(record: dict[str, Any]) -> str:
    """JSON with a line for each cell."""
    cells = ",\n".join("  " + json.dumps(cell, ensure_ascii=False) for cell in record["cells"])
    rest = {name: value for name, value in record.items() if name != "cells"}
    head = json.dumps(rest, ensure_ascii=False, indent=1)[:-2]
    return f'{head},\n "cells": [\n{cells}\n ]\n}}\n'


def markdown(table: Table, command: str) -> str:
    """The table as a page."""
    lines = [f"# {table.title}", "", f"{table.paper}. Made by `{command}`.", "", grid(table)]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def grid(table: Table) -> str:
    """The table itself, in Markdown: shares in per cent with their interval; one with many columns lies on its side."""
    lines = cells_of(table)
    if len(table.columns) > max(len(table.rows), 8):
        lines = [list(line) for line in zip(*lines, strict=True)]
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([shown[0], "|" + " --- |" * len(lines[0]), *shown[1:]])


def cells_of(table: Table) -> list[list[str]]:
    """The lines of a table as text, the headers first; rows without a cell are left out."""
    headers = [f"{table.groups[c]}: {c}" if c in table.groups else c for c in table.columns]
    lines = [
        [row, *(shown_cell(table.cell(row, column), table.units.get(column)) for column in table.columns)]
        for row in table.rows
    ]
    return [[table.first, *headers], *(line for line in lines if any(line[1:]))]


def in_terminal(table: Table, width: int | None = None) -> str:
    """The table with its title and notes as aligned text.

    Args:
        table: what to show.
        width: of the terminal; columns that do not fit follow below, with the rows' names again. None for any width.
    """
    lines = cells_of(table)
    if len(table.columns) > len(table.rows):
        lines = [list(line) for line in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    blocks, start = [], 1
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
    if unit is not None:
        value = unit.format(cell.value)
        return value if cell.low is None else f"{value} [{unit.format(cell.low)}, {unit.format(cell.high)}]"
    return f"{100 * cell.value:.1f} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
