"""Tables that set methods against benchmarks: the main results (Tab. 1), and full against partial data (Tab. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vismem.evaluation.runs import Runs
from vismem.evaluation.settings import ABILITIES, Benchmark, Method
from vismem.evaluation.tables.gathering import Answers, gather, never_invoked, scores
from vismem.evaluation.tables.layout import Cell, Table, averaged, measured

AVERAGE = "average"


def compared(methods: Mapping[str, Method], benchmarks: Sequence[Benchmark], answers: Answers) -> list[Cell]:
    """A cell for each method and benchmark, and the averages: of each ability, and of everything."""
    cells = []
    for label in methods:
        known = {b.name: found for b in benchmarks if (found := scores(answers, label, b.name)) is not None}
        cells += [measured(label, name, found) for name, found in known.items()]
        for ability, names in by_ability(benchmarks).items():
            if len(names) > 1 and all(name in known for name in names):
                cells.append(averaged(label, f"{AVERAGE}, {ability}", [known[name] for name in names]))
        if len(benchmarks) > 1 and len(known) == len(benchmarks):
            cells.append(averaged(label, AVERAGE, list(known.values())))
    return cells


def by_ability(benchmarks: Sequence[Benchmark]) -> dict[str, list[str]]:
    """Benchmarks' names by ability, in the paper's order; those without one are left out."""
    named = dict.fromkeys([*ABILITIES, *(b.ability for b in benchmarks if b.ability)])
    found = {ability: [b.name for b in benchmarks if b.ability == ability] for ability in named}
    return {ability: names for ability, names in found.items() if names}


def columns_of(benchmarks: Sequence[Benchmark]) -> list[str]:
    """Benchmarks by ability, each group with its average, and the average of all at the end."""
    groups, found = by_ability(benchmarks), []
    for ability, names in groups.items():
        found += names + ([f"{AVERAGE}, {ability}"] if len(names) > 1 else [])
    found += [b.name for b in benchmarks if not b.ability]
    return found + ([AVERAGE] if len(benchmarks) > 1 else [])


def main(runs: Runs) -> Table:
    """Main results: every method on every benchmark, by ability."""
    settings = runs.settings
    methods = {method.name: method for method in settings.methods}
    answers = gather(runs, methods, settings.benchmarks, "main")
    return Table(
        name="main",
        title="Main results",
        paper="The paper's Tab. 1",
        rows=list(methods),
        columns=columns_of(settings.benchmarks),
        cells=compared(methods, settings.benchmarks, answers),
        groups={b.name: b.ability for b in settings.benchmarks if b.ability},
        notes=[*seeds_note(runs, methods), *never_invoked(methods, answers)],
        first="method",
    )


def partial(runs: Runs) -> Table:
    """Every trained method on all of the data and on a part of it."""
    section = runs.settings.partial
    data = section.get("data") or {}
    if len(data) < 2:
        raise ValueError("the table partial needs partial.data: {full: FILE, partial: FILE}")
    trained, benchmarks = runs.settings.of(section)
    methods = {
        f"{method.name}, {name}": replace(
            method, name=f"{method.name}, {name}", train=[{**step, "data": source} for step in method.train]
        )
        for method in trained
        if method.train
        for name, source in data.items()
    }
    if not methods:
        raise ValueError("the table partial needs a method with train: it trains it on each of partial.data")
    methods = {"vanilla": Method("vanilla"), **methods}
    answers = gather(runs, methods, benchmarks, "partial")
    return Table(
        name="partial",
        title="Full against partial training data",
        paper="The paper's Tab. 7",
        rows=list(methods),
        columns=columns_of(benchmarks),
        cells=compared(methods, benchmarks, answers),
        groups={b.name: b.ability for b in benchmarks if b.ability},
        notes=[
            f"Data: {', '.join(f'{name} is `{source}`' for name, source in data.items())}.",
            *seeds_note(runs, methods),
            *never_invoked(methods, answers),
        ],
        first="method, data",
    )


def seeds_note(runs: Runs, methods: Mapping[str, Method]) -> list[str]:
    """What the numbers are."""
    several = [label for label, method in methods.items() if len(runs.seeds(method)) > 1]
    first = "Per cent, with the 95 % bootstrap interval over questions"
    if not several:
        return [f"{first}."]
    many = "all rows but those of the base alone" if len(several) > 3 else ", ".join(several)
    return [f"{first} and, for {many}, over the seeds {', '.join(map(str, runs.settings.seeds))}."]
