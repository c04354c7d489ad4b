"""When memory is invoked: how often by task, and where in the answer (Fig. 5 and 9)."""

from __future__ import annotations

import numpy as np

from vismem.config import KINDS
from vismem.evaluation.records import Record
from vismem.evaluation.runs import Runs
from vismem.evaluation.tables.gathering import gather, never_invoked
from vismem.evaluation.tables.layout import Cell, Table, measured

BINS = 10


def when(runs: Runs) -> Table:
    """Invocations per answer by kind, answers that invoke at all, and relative positions, by benchmark."""
    ours, benchmarks = runs.settings.ours(), runs.settings.benchmarks
    answers = gather(runs, {ours.name: ours}, benchmarks, "when")
    cells, positions = [], {}
    for benchmark in benchmarks:
        seeds = answers[ours.name, benchmark.name]
        row = benchmark.name
        cells.append(measured(row, "answers that invoke", [[float(bool(r.invocations)) for r in s] for s in seeds]))
        for kind in KINDS:
            counts = [[float(sum(i["kind"] == kind for i in r.invocations)) for r in s] for s in seeds]
            cells.append(measured(row, f"{kind} per answer", counts))
        records = [record for seed in seeds for record in seed]
        places = sum(record.delimiters for record in records)
        made = sum(len(record.invocations) for record in records)
        cells.append(Cell(row, "per delimiter", round(made / max(places, 1), 4), n=places))
        positions[row] = {}
        for kind in KINDS:
            where = relative(records, kind)
            if where:
                cells.append(Cell(row, f"{kind}, median position", round(float(np.median(where)), 4), n=len(where)))
            counts, _ = np.histogram(where, BINS, (0.0, 1.0))
            positions[row][kind] = counts.tolist()
    units = {f"{kind} per answer": "{:.2f}" for kind in KINDS} | {"per delimiter": "{:.2f}"}
    units |= {f"{kind}, median position": "{:.2f}" for kind in KINDS}
    return Table(
        name="when",
        title="When memory is invoked",
        paper="The paper's Fig. 5 and 9",
        rows=[b.name for b in benchmarks],
        columns=["answers that invoke", *units],
        cells=cells,
        units=units,
        notes=[
            f"The model decides ({ours.name}). A position is the index of the invocation among the answer's tokens, "
            "as a share of the answer's length.",
            *never_invoked({ours.name: ours}, answers),
        ],
        first="task",
        extra={"positions": positions, "bins": BINS},
    )


def relative(records: list[Record], kind: str) -> list[float]:
    """Relative positions, 0 to 1, of all invocations of a kind."""
    return [i["position"] / max(r.tokens - 1, 1) for r in records for i in r.invocations if i["kind"] == kind]
