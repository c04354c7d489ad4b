"""Answers of many methods to many benchmarks, with one bar over all of them that tells the remaining time.

Rehearsed, it only looks whether everything is there to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from vismem.escaping import visible
from vismem.evaluation.records import Record
from vismem.evaluation.runs import Rehearsed, Runs
from vismem.evaluation.settings import Benchmark, Method

Answers = dict[tuple[str, str], list[list[Record]]]  # by row's label and benchmark's name: [seeds][questions]


def gather(runs: Runs, methods: Mapping[str, Method], benchmarks: Sequence[Benchmark], title: str = "") -> Answers:
    """All answers; trains, loads and asks only where something is missing.

    Args:
        runs: the methods' makings and files.
        methods: by the label of their row.
        benchmarks: the columns.
        title: of the progress bar.

    Returns:
        For each label and benchmark, each seed's records; what a method does not have is not in it.

    Raises:
        ValueError: if there is no method or no benchmark; rehearsed, also as `Runs.check`.
        Rehearsed: where it would begin to ask, when it is only rehearsed.
    """
    if not methods or not benchmarks:
        raise ValueError(f"nothing to compare: there are {len(methods)} methods and {len(benchmarks)} benchmarks")
    plan = [
        (label, method, seed, benchmark)
        for label, method in methods.items()
        for seed in runs.seeds(method)
        for benchmark in benchmarks
        if runs.has(method, benchmark)
    ]
    if runs.rehearsing:
        with tqdm(plan, desc=f"{title}, what it needs", unit="set", delay=2, leave=False, dynamic_ncols=True) as bar:
            for _, method, seed, benchmark in bar:
                runs.check(method, benchmark, seed)
        raise Rehearsed
    found: Answers = {}
    with tqdm(plan, desc=title, unit="set", delay=1, dynamic_ncols=True) as bar:
        for label, method, seed, benchmark in bar:
            # Shown before its delay is over, a bar would not end its line: an error would stand on it.
            bar.set_postfix_str(visible(f"{label}, {benchmark.name}"), refresh=bar.n > 0)
            found.setdefault((label, benchmark.name), []).append(runs.records(method, benchmark, seed))
    return found


def never_invoked(methods: Mapping[str, Method], answers: Answers) -> list[str]:
    """A sentence for each method that has a memory, may invoke it, and never did."""
    notes = []
    for label, method in methods.items():
        if not method.remembers or method.policy == "off":
            continue
        records = [record for (row, _), seeds in answers.items() if row == label for seed in seeds for record in seed]
        if records and not any(record.invocations for record in records):
            notes.append(f"{label} never invoked memory in {len(records)} answers, so these are the base's.")
    return notes


def scores(answers: Answers, label: str, benchmark: str) -> list[list[float]] | None:
    """Scores [seeds][questions] of one cell, or None."""
    found = answers.get((label, benchmark))
    return None if found is None else [[record.score for record in seed] for seed in found]
