"""Measures the time per answer of several methods, interleaved: all of them answer each question in turn.

Questions are answered one at a time, in several rounds. Results are medians over questions of each question's median
over rounds. They are saved beside the answers and not measured again.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from vismem import files
from vismem.data import Row, prompt_inputs
from vismem.evaluation.answering import answerable, policy_for
from vismem.evaluation.records import check_settings
from vismem.evaluation.runs import DryRunFinishedError, Runs
from vismem.evaluation.settings import Method
from vismem.model import VisMem

CLOCKS = {"wall": ("wall clock", time.perf_counter), "processor": ("processor time", time.process_time)}


@dataclass(frozen=True)
class Timing:
    """Seconds of one answer and to its first token, and its numbers of sampled tokens and invocations."""

    seconds: float
    first: float
    sampled: int
    invocations: int


def measure_times(runs: Runs, methods: Mapping[str, Method], title: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Times of several methods, and a note on how they were measured.

    Methods of the same name share a model; the others have one each, all in memory at once.

    Returns:
        For each label `seconds` per answer, `first` (seconds to the first token), `per_second` (sampled tokens per
        second), `ratio` (seconds per answer relative to the first label), `per_token` (the same per sampled token),
        `invocations` per answer, and `n`.

    Raises:
        ValueError: if no benchmark has rows.
        DryRunFinishedError: at the end of a dry run.
    """
    settings, section = runs.settings, runs.settings.latency
    path = Path(settings.output_dir) / "answers" / f"times-{title}.json"
    asked = {"latency": dict(section), "max_new_tokens": settings.max_new_tokens, "seed": settings.seeds[0]}
    asked |= {"ways": {label: [method.name, method.policy] for label, method in methods.items()}}
    if path.is_file():
        return saved_times(path, asked)
    (clock, read_clock), rounds = CLOCKS[section.get("clock", "wall")], section.get("rounds", 3)
    rows = questions(runs, section.get("questions", 12))
    if runs.dry_run:
        raise DryRunFinishedError
    models = {
        name: runs.load(runs.artefact(method, settings.seeds[0]))
        for name, method in {method.name: method for method in methods.values()}.items()
    }
    first = next(iter(models.values()))
    rows, failed = answerable(first, rows)
    if not rows:
        raise ValueError(f"no question can be answered for times; the first: {failed[0].id}: {failed[0].error}")
    measured: dict[str, list[list[Timing]]] = {label: [[] for _ in rows] for label in methods}
    with tqdm(total=(rounds + 1) * len(rows), desc=f"{title}, times", unit="question", delay=1) as bar:
        for turn in range(rounds + 1):  # the first is a warm-up
            for index, row in enumerate(rows):
                bar.update()
                for label, method in list(methods.items())[:: 1 if turn % 2 else -1]:
                    model = models[method.name]
                    policy = policy_for(model, row, method.policy)
                    timing = time_answer(model, row, policy, settings.max_new_tokens, read_clock)
                    if turn:
                        measured[label][index].append(timing)
    found = summarize(measured)
    cpu = platform.processor() or platform.machine()
    where = cpu if first.device.type == "cpu" else torch.cuda.get_device_name(first.device)
    note = (
        f"Times: {len(rows)} questions one at a time, {rounds} interleaved rounds, medians, {clock}, {where}, "
        f"{torch.get_num_threads()} thread(s); ratios are per question, against {next(iter(methods))}."
    )
    files.write_json(path, {"settings": asked, "times": found, "notes": [note]}, indent=1)
    return found, [note]


def summarize(measured: Mapping[str, list[list[Timing]]]) -> dict[str, dict[str, Any]]:
    """Medians by label, of measurements by question and round; ratios are relative to the first label."""
    found: dict[str, dict[str, Any]] = {}
    reference: tuple[list[float], list[float]] | None = None
    for label, questions in measured.items():
        answers = [median(timing.seconds for timing in rounds) for rounds in questions]
        last = [rounds[-1] for rounds in questions]  # greedy answers, the same in every round
        pace = [seconds / max(timing.sampled, 1) for seconds, timing in zip(answers, last, strict=True)]
        reference = reference or (answers, pace)
        found[label] = {
            "seconds": round(median(answers), 4),
            "first": round(median(median(timing.first for timing in rounds) for rounds in questions), 4),
            "per_second": round(1 / median(pace), 2),
            "ratio": round(median(a / b for a, b in zip(answers, reference[0], strict=True)), 3),
            "per_token": round(median(a / b for a, b in zip(pace, reference[1], strict=True)), 3),
            "invocations": round(sum(timing.invocations for timing in last) / len(last), 2),
            "n": len(questions),
        }
    return found


def saved_times(path: Path, settings: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Times and notes of an earlier run. Raises ValueError if the file is damaged or has other settings."""
    try:
        earlier = json.loads(path.read_bytes())
        saved = earlier["times"], earlier["notes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure again") from error
    check_settings(path, earlier.get("settings"), json.loads(json.dumps(settings)))
    return saved


def questions(runs: Runs, count: int) -> list[Row]:
    """Questions from all benchmarks with rows, alternating between benchmarks."""
    sets = [runs.rows(b) for b in runs.settings.benchmarks if b.data]
    if not sets:
        raise ValueError("times need a benchmark with data=...; tasks of lmms-eval have no rows to ask one by one")
    spread = [[rows[len(rows) * i // max(count, 1)] for i in range(min(count, len(rows)))] for rows in sets]
    return [rows[turn] for turn in range(count) for rows in spread if turn < len(rows)][:count]


@torch.inference_mode()
def time_answer(model: VisMem, row: Row, policy: Any, tokens: int, clock: Any) -> Timing:
    """Times one greedy answer."""
    inputs: dict[str, Any] = model.move_inputs(prompt_inputs(model.processor, [row]))
    watch = FirstToken(clock)
    synchronize(model.device)
    start = clock()
    out: Any = model.generate(
        **inputs,
        invocation=policy,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        record=True,
        streamer=watch,
    )
    synchronize(model.device)
    end = clock()
    return Timing(end - start, watch.at - start, int(out.rollout[0].sampled.sum()), len(out.invocations[0]))


class FirstToken:
    """A streamer that records the time of the first new token."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.calls, self.at = clock, 0, 0.0

    def put(self, _value: Any) -> None:
        """Called with the prompt, then with each token."""
        self.calls += 1
        if self.calls == 2:
            self.at = self.clock()

    def end(self) -> None:
        """Nothing to flush."""


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
