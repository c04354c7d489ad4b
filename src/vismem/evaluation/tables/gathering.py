"""Collects the answers of many methods to many benchmarks, with one progress bar; a dry run only checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from vismem.escaping import visible
from vismem.evaluation.records import Record
from vismem.evaluation.runs import DryRunFinishedError, Runs
from vismem.evaluation.settings import Benchmark, Method

Answers = dict[tuple[str, str], list[list[Record]]]  # by row label and benchmark name: [seeds][questions]


def gather(runs: Runs, methods: Mapping[str, Method], benchmarks: Sequence[Benchmark], title: str = "") -> Answers:
    """Collects all answers; trains, loads and decodes only what is missing.

    `methods` are by row label. The result lacks benchmarks that a method cannot answer.

    Raises:
        ValueError: if there is no method or no benchmark; in a dry run, whatever `Runs.check` raises.
        DryRunFinishedError: at the end of a dry run.
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
    if runs.dry_run:
        with tqdm(plan, desc=f"{title}, what it needs", unit="set", delay=2, leave=False, dynamic_ncols=True) as bar:
            for _, method, seed, benchmark in bar:
                runs.check(method, benchmark, seed)
        raise DryRunFinishedError
    found: Answers = {}
    with tqdm(plan, desc=title, unit="set", delay=1, dynamic_ncols=True) as bar:
        for label, method, seed, benchmark in bar:
            # A bar shown before its delay does not end its line, so an error would be printed on it.
            bar.set_postfix_str(visible(f"{label}, {benchmark.name}"), refresh=bar.n > 0)
            found.setdefault((label, benchmark.name), []).append(runs.records(method, benchmark, seed))
    return found


def never_invoked(methods: Mapping[str, Method], answers: Answers) -> list[str]:
    """A note for each method that has a memory, may invoke it, and never did."""
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
