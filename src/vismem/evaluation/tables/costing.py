"""Latency (Tab. 12): what an answer of each method takes, beside the base alone."""

from __future__ import annotations

from vismem.evaluation.runs import Runs
from vismem.evaluation.settings import Method
from vismem.evaluation.tables.layout import Cell, Table
from vismem.evaluation.timing import Way, timed

SHOWN = {
    "seconds": ("seconds per answer", "{:.3f}"),
    "first": ("to the first token", "{:.3f}"),
    "per_second": ("tokens/s", "{:.1f}"),
    "ratio": ("per answer", "{:.2f}x"),
    "per_token": ("per token", "{:.2f}x"),
    "invocations": ("invocations", "{:.2f}"),
}


def latency(runs: Runs) -> Table:
    """Time per answer of all methods, one question at a time."""
    methods = {"vanilla": Method("vanilla")}
    methods |= {m.name: m for m in runs.settings.methods if not m.bound and (m.checkpoint or m.train)}
    times, notes = timed(runs, {label: Way(method) for label, method in methods.items()}, "latency")
    cells = [
        Cell(label, column, found[key], n=found["n"])
        for label, found in times.items()
        for key, (column, _) in SHOWN.items()
    ]
    return Table(
        name="latency",
        title="What an answer takes",
        paper="The paper's Tab. 12",
        rows=list(times),
        columns=[column for column, _ in SHOWN.values()],
        cells=cells,
        units=dict(SHOWN.values()),
        notes=notes,
        first="method",
        extra={"times": times},
    )
