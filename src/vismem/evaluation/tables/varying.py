"""Tables that vary one method's memory: by sub-task (Tab. 5, 6), by invocation (Tab. 3, 9), by length (Tab. 10, 11)."""

from __future__ import annotations

from dataclasses import replace

from vismem.evaluation.runs import Runs
from vismem.evaluation.settings import Method
from vismem.evaluation.tables.comparing import AVERAGE, columns_of, compared, seeds_note
from vismem.evaluation.tables.gathering import gather, never_invoked
from vismem.evaluation.tables.layout import Cell, Table, measured
from vismem.evaluation.timing import Way, timed
from vismem.training.settings import memory_config, values_for

MODES = {"short-term only": "short", "long-term only": "long", "both": "learned"}
RATES = (25, 50, 75, 100)  # per cent
LENGTHS = {"query_length": "K", "short_length": "N_s", "long_length": "N_l"}


def subtasks(runs: Runs) -> Table:
    """Short-term memory alone, long-term memory alone, and both, by sub-task."""
    ours, benchmarks = runs.settings.ours(), [b for b in runs.settings.benchmarks if b.subtask]
    if not benchmarks:
        raise ValueError("the table subtasks needs a benchmark with subtask=COLUMN, which tells its sub-tasks")
    methods = {"vanilla": Method("vanilla")}
    methods |= {label: replace(ours, invocation=mode) for label, mode in MODES.items()}
    answers = gather(runs, methods, benchmarks, "subtasks")
    cells, columns, groups = [], [], {}
    for benchmark in benchmarks:
        for label in methods:
            seeds = answers[label, benchmark.name]
            told = runs.subtasks(benchmark, seeds[0])  # all seeds answer the same questions in the same order
            for name in dict.fromkeys(told):
                column = f"{benchmark.name}, {name}"
                chosen = [[r.score for r, own in zip(seed, told, strict=True) if own == name] for seed in seeds]
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
    """Who invokes: nobody, chance at four rates, the model with one kind or with both; with time."""
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
        raise ValueError(f"invocation.benchmarks names {unknown[0]!r}, which is none of the benchmarks")
    answers = gather(runs, methods, benchmarks, "invocation")
    cells = compared(methods, benchmarks, answers)
    for label in methods:
        records = [record for b in benchmarks for seed in answers[label, b.name] for record in seed]
        counts, places = sum(len(r.invocations) for r in records), sum(r.delimiters for r in records)
        cells.append(Cell(label, "invocations per answer", round(counts / len(records), 3), n=len(records)))
        cells.append(Cell(label, "per delimiter", round(counts / max(places, 1), 3), n=places))
    times, notes = timed(runs, {label: Way(ours, mode) for label, mode in modes.items()}, "invocation")
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
    return Table(
        name="invocation",
        title="Who invokes memory, and what it costs",
        paper="The paper's Tab. 3 and 9",
        rows=list(methods),
        columns=[*columns_of(benchmarks), *units],
        cells=cells,
        units=units,
        groups={b.name: b.ability for b in benchmarks if b.ability},
        notes=[
            f"The memory is that of {ours.name}.",
            *seeds_note(runs, methods),
            *never_invoked(methods, answers),
            *notes,
        ],
        first="invocation",
        extra={"times": times},
    )


def lengths(runs: Runs) -> Table:
    """Lengths of the query and of both memories, each varied with the others as they are, trained anew each time."""
    settings, section = runs.settings, runs.settings.lengths
    steps = section.get("train") or settings.ours().train
    if not steps:
        raise ValueError("the table lengths trains a memory for each length: set lengths.train, or train of the method")
    stage = steps[0]["step"] if steps[0]["step"] != "all" else "warmup"
    layers = [dict(settings.training), {n: v for n, v in steps[0].items() if n != "step"}]
    config = memory_config(values_for(stage, layers)["memory"])
    methods, points = {}, {}
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
    return Table(
        name="lengths",
        title="Lengths of query and memories",
        paper="The paper's Tab. 10 and 11",
        rows=list(methods),
        columns=columns_of(benchmarks),
        cells=compared(methods, benchmarks, answers),
        groups={b.name: b.ability for b in benchmarks if b.ability},
        notes=[f"As configured: {usual}.", *seeds_note(runs, methods), *never_invoked(methods, answers)],
        first="length",
        extra={"points": points, "average": AVERAGE},
    )
