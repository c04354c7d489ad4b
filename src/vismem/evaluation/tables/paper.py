"""The paper's tables and figures: one function for each, from `Runs` to `Table`.

Each gathers the answers of its methods to its benchmarks, with one progress bar; a dry run only checks what they need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from vismem.config import KINDS
from vismem.escaping import visible
from vismem.evaluation.intervals import BOOTSTRAP_SAMPLES, interval
from vismem.evaluation.records import Record
from vismem.evaluation.runs import DryRunFinishedError, Runs
from vismem.evaluation.settings import ABILITIES, Benchmark, Method
from vismem.evaluation.tables.layout import Cell, Table, averaged, measured
from vismem.evaluation.timing import measure_times
from vismem.training.settings import memory_config, values_for

HEADINGS = {  # title, place in the paper, and what the rows are
    "main": ("Main results", "The paper's Tab. 1", "method"),
    "subtasks": ("Which memory helps which sub-task", "The paper's Tab. 5 and 6", "memory"),
    "partial": ("Full against partial training data", "The paper's Tab. 7", "method, data"),
    "continual": ("Stages of data, one after another", "The paper's Tab. 8", "method, stage"),
    "invocation": ("Who invokes memory, and what it costs", "The paper's Tab. 3 and 9", "invocation"),
    "lengths": ("Lengths of query and memories", "The paper's Tab. 10 and 11", "length"),
    "latency": ("What an answer takes", "The paper's Tab. 12", "method"),
    "when": ("When memory is invoked", "The paper's Fig. 5 and 9", "task"),
}
AVERAGE = "average"
MODES = {"short-term only": "short", "long-term only": "long", "both": "learned"}
RATES = (25, 50, 75, 100)  # of random invocation, per cent
LENGTHS = {"query_length": "K", "short_length": "N_s", "long_length": "N_l"}
VANILLA = {"vanilla": Method("vanilla")}
BINS = 10  # of relative positions
LATENCIES = {  # of the measured times: their column and unit
    "seconds": ("seconds per answer", "{:.3f}"),
    "first": ("to the first token", "{:.3f}"),
    "per_second": ("tokens/s", "{:.1f}"),
    "ratio": ("per answer", "{:.2f}x"),
    "per_token": ("per token", "{:.2f}x"),
    "invocations": ("invocations", "{:.2f}"),
}
Answers = dict[tuple[str, str], list[list[Record]]]  # by row label and benchmark name: [seeds][questions]


def gather(runs: Runs, methods: Mapping[str, Method], benchmarks: Sequence[Benchmark], title: str) -> Answers:
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


def failed(answers: Answers) -> list[str]:
    """A note on questions without an answer: for each benchmark, the most that any method failed on."""
    worst = {name: (0, 0) for _, name in answers}
    for (_, name), seeds in answers.items():
        counts = [(sum(bool(record.error) for record in seed), len(seed)) for seed in seeds]
        worst[name] = max(worst[name], *counts)
    found = [f"{count} of {total} in {name}" for name, (count, total) in worst.items() if count]
    return [f"Failed questions, which count as wrong: {', '.join(found)}."] if found else []


def compared(methods: Mapping[str, Method], benchmarks: Sequence[Benchmark], answers: Answers) -> list[Cell]:
    """A cell for each method and benchmark, and averages over each ability and over all benchmarks."""
    cells = []
    for label in methods:
        known = {b.name: scores(answers[label, b.name]) for b in benchmarks if (label, b.name) in answers}
        cells += [measured(label, name, found) for name, found in known.items()]
        for ability, names in by_ability(benchmarks).items():
            if len(names) > 1 and all(name in known for name in names):
                cells.append(averaged(label, f"{AVERAGE}, {ability}", [known[name] for name in names]))
        if len(benchmarks) > 1 and len(known) == len(benchmarks):
            cells.append(averaged(label, AVERAGE, list(known.values())))
    return cells


def scores(seeds: Sequence[Sequence[Record]]) -> list[list[float]]:
    """Scores [seeds][questions] of one cell."""
    return [[record.score for record in seed] for seed in seeds]


def by_ability(benchmarks: Sequence[Benchmark]) -> dict[str, list[str]]:
    """Benchmarks' names by ability, in the paper's order, without those that have none."""
    named = dict.fromkeys([*ABILITIES, *(b.ability for b in benchmarks if b.ability)])
    found = {ability: [b.name for b in benchmarks if b.ability == ability] for ability in named}
    return {ability: names for ability, names in found.items() if names}


def columns_of(benchmarks: Sequence[Benchmark]) -> list[str]:
    """Columns by ability, each group followed by its average, and the average of all at the end."""
    groups, found = by_ability(benchmarks), []
    for ability, names in groups.items():
        found += names + ([f"{AVERAGE}, {ability}"] if len(names) > 1 else [])
    found += [b.name for b in benchmarks if not b.ability]
    return found + ([AVERAGE] if len(benchmarks) > 1 else [])


def seeds_note(runs: Runs, methods: Mapping[str, Method]) -> list[str]:
    """What the intervals cover."""
    several = [label for label, method in methods.items() if len(runs.seeds(method)) > 1]
    first = "Per cent, with the 95 % bootstrap interval over questions"
    if not several:
        return [f"{first}."]
    many = "all rows but those of the base alone" if len(several) > 3 else ", ".join(several)
    return [f"{first} and, for {many}, over the seeds {', '.join(map(str, runs.settings.seeds))}."]


def comparison(
    runs: Runs,
    name: str,
    methods: Mapping[str, Method],
    benchmarks: Sequence[Benchmark],
    answers: Answers | None = None,
    notes: Sequence[str] = (),
    extra: dict[str, Any] | None = None,
) -> Table:
    """A table of methods by benchmarks; gathers the answers if they are not given."""
    answers = answers or gather(runs, methods, benchmarks, name)
    return headed(
        name,
        rows=list(methods),
        columns=columns_of(benchmarks),
        cells=compared(methods, benchmarks, answers),
        groups={b.name: b.ability for b in benchmarks if b.ability},
        notes=[*notes, *seeds_note(runs, methods), *never_invoked(methods, answers), *failed(answers)],
        extra=extra or {},
    )


def headed(name: str, **fields: Any) -> Table:
    """A table with its heading."""
    title, paper, first = HEADINGS[name]
    return Table(name=name, title=title, paper=paper, first=first, **fields)


def main(runs: Runs) -> Table:
    """Every method on every benchmark, by ability."""
    methods = {method.name: method for method in runs.settings.methods}
    return comparison(runs, "main", methods, runs.settings.benchmarks)


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
    return comparison(
        runs,
        "partial",
        VANILLA | methods,
        benchmarks,
        notes=[f"Data: {', '.join(f'{name} is `{source}`' for name, source in data.items())}."],
    )


def subtasks(runs: Runs) -> Table:
    """Short-term memory alone, long-term memory alone, and both, by sub-task."""
    ours, benchmarks = runs.settings.ours(), [b for b in runs.settings.benchmarks if b.subtask]
    if not benchmarks:
        raise ValueError("the table subtasks needs a benchmark with subtask=COLUMN")
    methods = VANILLA | {label: replace(ours, invocation=mode) for label, mode in MODES.items()}
    answers = gather(runs, methods, benchmarks, "subtasks")
    cells: list[Cell] = []
    groups: dict[str, str] = {}  # by column
    for benchmark in benchmarks:
        for label in methods:
            seeds = answers[label, benchmark.name]
            labels = runs.subtasks(benchmark, seeds[0])  # all seeds answer the same questions in the same order
            for name in dict.fromkeys(labels):
                column = f"{benchmark.name}, {name}"
                chosen = [[r.score for r, own in zip(seed, labels, strict=True) if own == name] for seed in seeds]
                cells.append(measured(label, column, chosen))
                groups[column] = benchmark.name
    return headed(
        "subtasks",
        rows=list(methods),
        columns=list(groups),
        cells=cells,
        notes=[
            f"The memory is that of {ours.name}.",
            *seeds_note(runs, methods),
            *never_invoked(methods, answers),
            *failed(answers),
        ],
        extra={"groups": groups},
    )


def invocation(runs: Runs) -> Table:
    """No invocation, random invocation at four rates, the model's own with one kind or both; scores and time."""
    settings, ours = runs.settings, runs.settings.ours()
    section = settings.invocation
    modes = {f"random, {rate} %": f"random:{rate / 100:g}" for rate in section.get("rates", RATES)}
    modes |= {"short-term only": "short", "long-term only": "long", "complete": "learned"}
    methods = {label: replace(ours, invocation=mode) for label, mode in modes.items()}
    names = section.get("benchmarks") or [b.name for b in settings.benchmarks]
    benchmarks = [b for b in settings.benchmarks if b.name in names]
    unknown = [name for name in names if name not in [b.name for b in benchmarks]]
    if unknown:
        raise ValueError(f"invocation.benchmarks names {unknown[0]!r}, which is not a benchmark")
    answers = gather(runs, VANILLA | methods, benchmarks, "invocation")
    table = comparison(
        runs,
        "invocation",
        VANILLA | methods,
        benchmarks,
        answers,
        notes=[f"The memory is that of {ours.name}."],
    )
    for label in table.rows:
        records = [record for b in benchmarks for seed in answers[label, b.name] for record in seed]
        counts, places = sum(len(r.invocations) for r in records), sum(r.delimiters for r in records)
        table.cells.append(Cell(label, "invocations per answer", round(counts / len(records), 3), n=len(records)))
        table.cells.append(Cell(label, "per delimiter", round(counts / max(places, 1), 3), n=places))
    times, notes = measure_times(runs, {"vanilla": replace(ours, invocation="off"), **methods}, "invocation")
    shown = {**LATENCIES, "ratio": ("time", "{:.2f}x")}
    shown = {key: shown[key] for key in ("seconds", "per_second", "ratio")}
    table.cells += timed(times, shown)
    table.units = {"invocations per answer": "{:.2f}", "per delimiter": "{:.2f}", **dict(shown.values())}
    table.columns += table.units
    table.notes += notes
    table.extra["times"] = times
    return table


def timed(times: Mapping[str, Mapping[str, Any]], shown: Mapping[str, tuple[str, str]]) -> list[Cell]:
    """The cells of measured times: `shown` has a column and a unit for each measurement."""
    return [
        Cell(label, column, found[key], n=found["n"])
        for label, found in times.items()
        for key, (column, _) in shown.items()
    ]


def lengths(runs: Runs) -> Table:
    """Lengths of the query and of both memories, one varied at a time and trained separately."""
    settings, section = runs.settings, runs.settings.lengths
    steps = section.get("train") or settings.ours().train
    if not steps:
        raise ValueError("the table lengths trains a memory for each length: set lengths.train, or train of the method")
    stage = steps[0]["step"] if steps[0]["step"] != "all" else "warmup"
    layers = [dict(settings.training), {n: v for n, v in steps[0].items() if n != "step"}]
    config = memory_config(values_for(stage, layers)["memory"])
    methods: dict[str, Method] = {}
    points: dict[str, list[tuple[int, str]]] = {}
    for name, symbol in LENGTHS.items():
        for value in section.get(name) or ():
            usual = value == getattr(config, name)
            label = "as configured" if usual else f"{symbol} = {value}"
            changed = [dict(step) for step in steps]
            if not usual:
                memory = changed[0].get("memory") or {}
                changed[0]["memory"] = {**({"preset": memory} if isinstance(memory, str) else memory), name: value}
            methods[label] = Method(label, train=changed, invocation=section.get("invocation") or "")
            points.setdefault(name, []).append((value, label))
    _, benchmarks = settings.of(section)
    usual = ", ".join(f"{symbol} = {getattr(config, name)}" for name, symbol in LENGTHS.items())
    return comparison(
        runs,
        "lengths",
        methods,
        benchmarks,
        notes=[f"As configured: {usual}."],
        extra={"points": points, "average": AVERAGE},
    )


def continual(runs: Runs) -> Table:
    """Every method trained through the stages; a benchmark belongs to the stage of the same name."""
    section = runs.settings.continual
    stages = section.get("stages") or {}
    if len(stages) < 2:
        raise ValueError("the table continual needs continual.stages: {NAME: {data: FILE, ...}, ...}, two or more")
    trained, benchmarks = runs.settings.of(section)
    methods = dict(VANILLA)
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
    listed = ", ".join(f"{name} (`{changes.get('data', '')}`)" for name, changes in stages.items())
    table = comparison(
        runs,
        "continual",
        methods,
        benchmarks,
        answers,
        notes=[
            "Forgotten: what a benchmark has lost since its own stage, averaged over the stages before the last; "
            "below 0 it has gained.",
            f"Stages: {listed}.",
        ],
        extra={"chains": chains},
    )
    table.columns.append("forgotten")
    for labels in chains.values():
        table.cells += forgetting(answers, labels, list(stages), [b.name for b in benchmarks])
    return table


def forgetting(answers: Answers, labels: list[str], stages: list[str], benchmarks: list[str]) -> list[Cell]:
    """How much the benchmarks of earlier stages have lost since their own stage, on the same questions."""
    lost = []
    for label, stage in zip(labels[:-1], stages[:-1], strict=True):
        if stage in benchmarks:
            then, now = scores(answers[label, stage]), scores(answers[labels[-1], stage])
            lost.append(np.array(then) - np.array(now))
    if not lost:
        return []
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(BOOTSTRAP_SAMPLES):
        seeds = rng.integers(len(lost[0]), size=len(lost[0]))
        samples.append(
            np.mean([part[seeds][:, rng.integers(part.shape[1], size=part.shape[1])].mean() for part in lost])
        )
    value, (low, high) = float(np.mean([part.mean() for part in lost])), interval(samples)
    each = [round(float(np.mean([part[seed].mean() for part in lost])), 4) for seed in range(len(lost[0]))]
    value, low, high = (round(x, 4) for x in (value, low, high))
    return [Cell(labels[-1], "forgotten", value, low, high, sum(part.shape[1] for part in lost), each)]


def latency(runs: Runs) -> Table:
    """Time per answer of all methods, one question at a time."""
    trained = [m for m in runs.settings.methods if not m.bound and (m.checkpoint or m.train)]
    times, notes = measure_times(runs, VANILLA | {method.name: method for method in trained}, "latency")
    return headed(
        "latency",
        rows=list(times),
        columns=[column for column, _ in LATENCIES.values()],
        cells=timed(times, LATENCIES),
        units=dict(LATENCIES.values()),
        notes=notes,
        extra={"times": times},
    )


def when(runs: Runs) -> Table:
    """Invocations per answer by kind, share of answers that invoke memory, and relative positions, by benchmark."""
    ours, benchmarks = runs.settings.ours(), runs.settings.benchmarks
    answers = gather(runs, {ours.name: ours}, benchmarks, "when")
    cells: list[Cell] = []
    positions: dict[str, dict[str, list[int]]] = {}
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
            positions[row][kind] = np.histogram(where, BINS, (0.0, 1.0))[0].tolist()
    units = {f"{kind} per answer": "{:.2f}" for kind in KINDS} | {"per delimiter": "{:.2f}"}
    units |= {f"{kind}, median position": "{:.2f}" for kind in KINDS}
    return headed(
        "when",
        rows=[b.name for b in benchmarks],
        columns=["answers that invoke", *units],
        cells=cells,
        units=units,
        notes=[
            f"The model decides ({ours.name}). A position is the index of the invocation among the answer's tokens, "
            "as a share of the answer's length.",
            *never_invoked({ours.name: ours}, answers),
            *failed(answers),
        ],
        extra={"positions": positions, "bins": BINS},
    )


def relative(records: list[Record], kind: str) -> list[float]:
    """Relative positions, 0 to 1, of all invocations of a kind."""
    return [i["position"] / max(r.tokens - 1, 1) for r in records for i in r.invocations if i["kind"] == kind]
