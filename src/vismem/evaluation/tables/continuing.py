"""Continual learning (Tab. 8): stages of data one after another, and after each how all benchmarks stand."""

from __future__ import annotations

from typing import Any

import numpy as np

from vismem.evaluation.intervals import interval
from vismem.evaluation.runs import Runs
from vismem.evaluation.settings import Method
from vismem.evaluation.tables.comparing import columns_of, compared, seeds_note
from vismem.evaluation.tables.gathering import Answers, gather, never_invoked, scores
from vismem.evaluation.tables.layout import Cell, Table

START = "before"
DRAWS = 2000


def continual(runs: Runs) -> Table:
    """Every method trained through the stages; benchmarks are matched to the stages by their names."""
    section = runs.settings.continual
    stages = section.get("stages") or {}
    if len(stages) < 2:
        raise ValueError("the table continual needs continual.stages: {NAME: {data: FILE, ...}, ...}, two or more")
    trained, benchmarks = runs.settings.of(section)
    methods = {"vanilla": Method("vanilla")}
    chains: dict[str, list[str]] = {}
    for method in trained:
        if not method.train:
            continue
        steps: list[dict[str, Any]] = []
        for name, changes in stages.items():
            steps = [*steps, *({**step, **changes} for step in method.train)]
            label = f"{method.name}, after {name}"
            methods[label] = Method(label, train=steps, invocation=method.invocation)
            chains.setdefault(method.name, []).append(label)
    if not chains:
        raise ValueError("the table continual needs a method with train")
    answers = gather(runs, methods, benchmarks, "continual")
    cells = compared(methods, benchmarks, answers)
    names = [b.name for b in benchmarks]
    for labels in chains.values():
        cells += forgetting(answers, labels, list(stages), names)
    told = ", ".join(f"{name} (`{changes.get('data', '')}`)" for name, changes in stages.items())
    return Table(
        name="continual",
        title="Stages of data, one after another",
        paper="The paper's Tab. 8",
        rows=list(methods),
        columns=[*columns_of(benchmarks), "forgotten"],
        cells=cells,
        groups={b.name: b.ability for b in benchmarks if b.ability},
        notes=[
            "Forgotten: what a benchmark has lost since its own stage, averaged over the stages before the last; "
            "below 0 it has gained.",
            f"Stages: {told}.",
            *seeds_note(runs, methods),
            *never_invoked(methods, answers),
        ],
        first="method, stage",
        extra={"chains": chains},
    )


def forgetting(answers: Answers, labels: list[str], stages: list[str], benchmarks: list[str]) -> list[Cell]:
    """How much the benchmarks of earlier stages have lost since their own, on the same questions."""
    lost = []
    for label, stage in zip(labels[:-1], stages[:-1], strict=True):
        if stage in benchmarks:
            then, now = scores(answers, label, stage), scores(answers, labels[-1], stage)
            lost.append(np.array(then) - np.array(now))
    if not lost:
        return []
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        seeds = rng.integers(len(lost[0]), size=len(lost[0]))
        drawn.append(np.mean([part[seeds][:, rng.integers(part.shape[1], size=part.shape[1])].mean() for part in lost]))
    value, (low, high) = float(np.mean([part.mean() for part in lost])), interval(drawn)
    each = [round(float(np.mean([part[seed].mean() for part in lost])), 4) for seed in range(len(lost[0]))]
    rounded = (round(x, 4) for x in (value, low, high))
    return [Cell(labels[-1], "forgotten", *rounded, sum(part.shape[1] for part in lost), each)]
