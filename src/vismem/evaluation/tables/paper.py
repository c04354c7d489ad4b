"""The paper's tables and figures: one function for each, from `Runs` to `Table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vismem.config import KINDS
from vismem.evaluation.intervals import interval
from vismem.evaluation.records import Record
from vismem.evaluation.runs import Runs
from vismem.evaluation.settings import ABILITIES, Benchmark, Method
from vismem.evaluation.tables.gathering import Answers, gather, never_invoked, scores
from vismem.evaluation.tables.layout import Cell, Table, averaged, measured
from vismem.evaluation.timing import TimedMethod, measure_times
from vismem.training.settings import memory_config, values_for

AVERAGE = "average"
MODES = {"short-term only": "short", "long-term only": "long", "both": "learned"}
RATES = (25, 50, 75, 100)  # of random invocation, per cent
LENGTHS = {"query_length": "K", "short_length": "N_s", "long_length": "N_l"}
BOOTSTRAP_SAMPLES = 2000
BINS = 10  # of relative positions
LATENCIES = {  # of the measured times: their column and unit
    "seconds": ("seconds per answer", "{:.3f}"),
    "first": ("to the first token", "{:.3f}"),
    "per_second": ("tokens/s", "{:.1f}"),
    "ratio": ("per answer", "{:.2f}x"),
    "per_token": ("per token", "{:.2f}x"),
    "invocations": ("invocations", "{:.2f}"),
}


def compared(methods: Mapping[str, Method], benchmarks: Sequence[Benchmark], answers: Answers) -> list[Cell]:
    """A cell for each method and benchmark, and averages over each ability and over all benchmarks."""
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
    methods: Mapping[str, Method],
    benchmarks: Sequence[Benchmark],
    answers: Answers,
    *,
    columns: Sequence[str] = (),
    cells: Sequence[Cell] = (),
    notes: tuple[Sequence[str], Sequence[str]] = ((), ()),
    **fields: Any,
) -> Table:
    """A table of methods by benchmarks; `columns` and `cells` are added after the benchmarks'.

    `notes` come before and after the notes on seeds and on methods that never invoked memory.
    """
    return Table(
        rows=list(methods),
        columns=[*columns_of(benchmarks), *columns],
        cells=[*compared(methods, benchmarks, answers), *cells],
        groups={b.name: b.ability for b in benchmarks if b.ability},
        notes=[*notes[0], *seeds_note(runs, methods), *never_invoked(methods, answers), *notes[1]],
        **fields,
    )


def main(runs: Runs) -> Table:
    """Every method on every benchmark, by ability."""
    settings = runs.settings
    methods = {method.name: method for method in settings.methods}
    answers = gather(runs, methods, settings.benchmarks, "main")
    return comparison(
        runs,
        methods,
        settings.benchmarks,
        answers,
        name="main",
        title="Main results",
        paper="The paper's Tab. 1",
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
    return comparison(
        runs,
        methods,
        benchmarks,
        answers,
        notes=([f"Data: {', '.join(f'{name} is `{source}`' for name, source in data.items())}."], ()),
        name="partial",
        title="Full against partial training data",
        paper="The paper's Tab. 7",
        first="method, data",
    )


def subtasks(runs: Runs) -> Table:
    """Short-term memory alone, long-term memory alone, and both, by sub-task."""
    ours, benchmarks = runs.settings.ours(), [b for b in runs.settings.benchmarks if b.subtask]
    if not benchmarks:
        raise ValueError("the table subtasks needs a benchmark with subtask=COLUMN")
    methods = {"vanilla": Method("vanilla")}
    methods |= {label: replace(ours, invocation=mode) for label, mode in MODES.items()}
    answers = gather(runs, methods, benchmarks, "subtasks")
    cells, columns, groups = [], [], {}
    for benchmark in benchmarks:
        for label in methods:
            seeds = answers[label, benchmark.name]
            labels = runs.subtasks(benchmark, seeds[0])  # all seeds answer the same questions in the same order
            for name in dict.fromkeys(labels):
                column = f"{benchmark.name}, {name}"
                chosen = [[r.score for r, own in zip(seed, labels, strict=True) if own == name] for seed in seeds]
                cells.append(measured(label, column, chosen))
                groups[column] = benchmark.name
                if column not in columns:
                    columns.append(column)
    return Table(
        name="subtasks",
        title="Which memory helps which sub-task",
        paper="The paper's Tab. 5 and 6",
        rows=list(methods),
        columns=columns,
        cells=cells,
        notes=[f"The memory is that of {ours.name}.", *seeds_note(runs, methods), *never_invoked(methods, answers)],
        first="memory",
        extra={"groups": groups},
    )


def invocation(runs: Runs) -> Table:
    """No invocation, random invocation at four rates, the model's own with one kind or both; scores and time."""
    settings, ours = runs.settings, runs.settings.ours()
    modes = {"vanilla": "off"}
    section = settings.invocation
    modes |= {f"random, {rate} %": f"random:{rate / 100:g}" for rate in section.get("rates", RATES)}
    modes |= {"short-term only": "short", "long-term only": "long", "complete": "learned"}
    methods = {label: replace(ours, invocation=mode) for label, mode in modes.items() if label != "vanilla"}
    methods = {"vanilla": Method("vanilla"), **methods}
    names = section.get("benchmarks") or [b.name for b in settings.benchmarks]
    benchmarks = [b for b in settings.benchmarks if b.name in names]
    unknown = [name for name in names if name not in [b.name for b in benchmarks]]
    if unknown:
        raise ValueError(f"invocation.benchmarks names {unknown[0]!r}, which is not a benchmark")
    answers = gather(runs, methods, benchmarks, "invocation")
    cells = []
    for label in methods:
        records = [record for b in benchmarks for seed in answers[label, b.name] for record in seed]
        counts, places = sum(len(r.invocations) for r in records), sum(r.delimiters for r in records)
        cells.append(Cell(label, "invocations per answer", round(counts / len(records), 3), n=len(records)))
        cells.append(Cell(label, "per delimiter", round(counts / max(places, 1), 3), n=places))
    times, notes = measure_times(runs, {label: TimedMethod(ours, mode) for label, mode in modes.items()}, "invocation")
    units = {"invocations per answer": "{:.2f}", "per delimiter": "{:.2f}"}
    shown = {
        "seconds": ("seconds per answer", "{:.3f}"),
        "per_second": ("tokens/s", "{:.1f}"),
        "ratio": ("time", "{:.2f}x"),
    }
    for label, found in times.items():
        for key, (column, unit) in shown.items():
            cells.append(Cell(label, column, found[key], n=found["n"]))
            units[column] = unit
    return comparison(
        runs,
        methods,
        benchmarks,
        answers,
        columns=list(units),
        cells=cells,
        notes=([f"The memory is that of {ours.name}."], notes),
        name="invocation",
        title="Who invokes memory, and what it costs",
        paper="The paper's Tab. 3 and 9",
        units=units,
        first="invocation",
        extra={"times": times},
    )


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
    answers = gather(runs, methods, benchmarks, "lengths")
    usual = ", ".join(f"{symbol} = {getattr(config, name)}" for name, symbol in LENGTHS.items())
    return comparison(
        runs,
        methods,
        benchmarks,
        answers,
        notes=([f"As configured: {usual}."], ()),
        name="lengths",
        title="Lengths of query and memories",
        paper="The paper's Tab. 10 and 11",
        first="length",
        extra={"points": points, "average": AVERAGE},
    )


def continual(runs: Runs) -> Table:
    """Every method trained through the stages; a benchmark belongs to the stage of the same name."""
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
    names = [b.name for b in benchmarks]
    cells = [cell for labels in chains.values() for cell in forgetting(answers, labels, list(stages), names)]
    listed = ", ".join(f"{name} (`{changes.get('data', '')}`)" for name, changes in stages.items())
    notes = [
        "Forgotten: what a benchmark has lost since its own stage, averaged over the stages before the last; "
        "below 0 it has gained.",
        f"Stages: {listed}.",
    ]
    return comparison(
        runs,
        methods,
        benchmarks,
        answers,
        columns=["forgotten"],
        cells=cells,
        notes=(notes, ()),
        name="continual",
        title="Stages of data, one after another",
        paper="The paper's Tab. 8",
        first="method, stage",
        extra={"chains": chains},
    )


def forgetting(answers: Answers, labels: list[str], stages: list[str], benchmarks: list[str]) -> list[Cell]:
    """How much the benchmarks of earlier stages have lost since their own stage, on the same questions."""
    lost = []
    for label, stage in zip(labels[:-1], stages[:-1], strict=True):
        if stage in benchmarks:
            then, now = scores(answers, label, stage), scores(answers, labels[-1], stage)
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
    methods = {"vanilla": Method("vanilla")}
    methods |= {m.name: m for m in runs.settings.methods if not m.bound and (m.checkpoint or m.train)}
    times, notes = measure_times(runs, {label: TimedMethod(method) for label, method in methods.items()}, "latency")
    cells = [
        Cell(label, column, found[key], n=found["n"])
        for label, found in times.items()
        for key, (column, _) in LATENCIES.items()
    ]
    return Table(
        name="latency",
        title="What an answer takes",
        paper="The paper's Tab. 12",
        rows=list(times),
        columns=[column for column, _ in LATENCIES.values()],
        cells=cells,
        units=dict(LATENCIES.values()),
        notes=notes,
        first="method",
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
