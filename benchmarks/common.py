"""What the benchmarks share: clocks, spreads of samples, tables, options, and results written row by row."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor

import vismem
from vismem import files


@dataclass(frozen=True)
class Case:
    """One row of a table: a base by name, the prompt's visual tokens, and the batch."""

    model: str
    visual_tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model}/{self.visual_tokens}/{self.batch}"


# Times.


class Clock(LogitsProcessor):
    """Records when each token is sampled, without changing anything: on a GPU, by events in its stream.

    Args:
        device: the model's.
        busy: count this process's CPU time instead of wall-clock time.
    """

    def __init__(self, device: torch.device, busy: bool = False) -> None:
        self.device, self.marks = device, []
        self.now = time.process_time if busy else time.perf_counter

    def tick(self) -> None:
        """Records the time; on a GPU, the time when it gets here."""
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = self.now()
        self.marks.append(mark)

    @property
    def ticks(self) -> list[float]:
        """The times in seconds; waits for the device."""
        if self.device.type != "cuda":
            return self.marks
        torch.cuda.synchronize(self.device)
        return [self.marks[0].elapsed_time(mark) / 1e3 for mark in self.marks]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tick()
        return scores


@dataclass
class Spread:
    """Median and quartiles of some samples, and the samples."""

    median: float
    q1: float
    q3: float
    samples: list[float]

    @classmethod
    def of(cls, samples: list[float], digits: int = 3) -> Spread:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return cls(*(round(v, digits) for v in (median, q1, q3)), [round(v, digits) for v in samples])


def turned(names: list[str], turn: int) -> list[str]:
    """The same names, starting with a different one each turn."""
    first = turn % max(len(names), 1)
    return names[first:] + names[:first]


class Progress:
    """Reports on stderr how far a run is and about how long it has left.

    Args:
        cases: all rows.
        work: their relative times.
        rounds: of each, after a warm-up round.
    """

    def __init__(self, cases: Sequence[Any], work: Sequence[float], rounds: int) -> None:
        self.cases, self.work, self.rounds, self.began = cases, work, rounds, time.monotonic()

    def say(self, index: int, turn: int) -> None:
        """Reports that this round of this row begins."""
        done = sum(self.work[:index]) + self.work[index] * turn / (self.rounds + 1)
        spent = time.monotonic() - self.began
        left = f"about {spent * (sum(self.work) - done) / done / 60:.0f} min left" if done else "warming up"
        where = f"[{index + 1}/{len(self.cases)}] {self.cases[index]}: round {turn}/{self.rounds}"
        print(f"{where}, {left}", file=sys.stderr, flush=True)


# Results.


def machine_facts(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The machine: processor, cores and threads, versions, dtype."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vismem": vismem.__version__,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Writes the report atomically; keeps the file's rows from other runs on this machine."""
    if path.is_file():
        earlier = json.loads(path.read_text())
        if earlier.get("machine") == found["machine"]:
            measured = {name_of(row) for row in found["rows"]}
            found["rows"] += [row for row in earlier["rows"] if name_of(row) not in measured]
            found["budgets"] += [entry for entry in earlier["budgets"] if entry["row"] not in measured]
    files.write_json(path, found, indent=1)


def name_of(row: dict[str, Any]) -> str:
    """A row's name in the table, as `--only` takes it."""
    return row["row"] if "row" in row else str(Case(row["model"], row["visual_tokens"], row["batch"]))


def aligned(lines: list[list[str]]) -> list[str]:
    """A Markdown table from a header and rows."""
    lines = [lines[0], ["-" * len(name) for name in lines[0]], *lines[1:]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]


def verdicts(budgets: list[dict[str, Any]]) -> list[str]:
    """A line for each budget: met or missed; `least` marks those where more is better."""
    lines = []
    for entry in budgets:
        verdict, bound = "met" if entry["met"] else "MISSED", "at least" if entry.get("least") else "at most"
        took = f"{entry['measured']:g} ({bound} {entry['allowed']:g})"
        lines.append(f"{verdict:6} {entry['row']}: {entry['what']} {took}")
    return lines


# Options and the run.


def parser(name: str, description: str, example: str, rounds: int, quick: str) -> argparse.ArgumentParser:
    """The options that all benchmarks with rows share; `quick` says what `--quick` does."""
    found = argparse.ArgumentParser(prog=f"vismem bench {name}", description=description, epilog=f"example: {example}")
    found.add_argument("--quick", action="store_true", help=f"{quick}; writes nothing unless --json is given")
    found.add_argument("--rounds", type=int, help=f"rounds per row (default {rounds})")
    found.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name starts so; others in the file stay")
    found.add_argument("--json", type=Path, metavar="PATH", help=f"where to write (default results/bench_{name}.json)")
    found.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    found.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return found


def add_busy(found: argparse.ArgumentParser) -> None:
    """The option to count only this process's time."""
    told = "count this process's CPU time; for one thread on a busy machine"
    found.add_argument("--busy", action="store_true", help=told)


def parsed(found: argparse.ArgumentParser, argv: list[str] | None, cases: Sequence[Any]) -> argparse.Namespace:
    """The options, checked; `args.cases` are the rows that `--only` selects from `cases`."""
    args = found.parse_args(argv)
    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            found.error(f"--{name} must be 1 or more, got {value}")
    if getattr(args, "busy", False) and (args.threads > 1 or args.device != "cpu"):
        found.error("--busy counts the CPU time of one thread; leave it out here")
    args.cases = [case for case in cases if not args.only or any(str(case).startswith(name) for name in args.only)]
    if not args.cases:
        found.error(f"--only {' '.join(args.only)} matches no row; there are {', '.join(map(str, cases))}")
    name = found.prog.split()[-1]
    if args.json is None and not args.quick:
        args.json = Path(f"results/bench_{name}.json")
    args.command = " ".join([found.prog, *(sys.argv[1:] if argv is None else argv)])
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    return args


def drive(
    name: str,
    path: Path | None,
    results: Iterable[Any],
    report: Callable[[list], dict[str, Any]],
    table: Callable[[list], str],
) -> int:
    """Measures, writes after every row, prints the table; 0 when done, 1 when runs could not be compared."""
    found: list = []
    try:
        for result in results:
            found.append(result)
            if path is not None:
                write(path, report(found))
    except RuntimeError as error:
        print(f"vismem bench {name}: {error}", file=sys.stderr)
        return 1
    print(table(found))
    return 0
