"""Metrics of a run: averages between two logs, times of phases, and sample completions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from vismem import jsonl
from vismem.config import KINDS
from vismem.data import Row
from vismem.decoding.trace import Rollout

BINS = 5  # of the histogram of where in an answer memory is invoked


class Metrics:
    """Values by name, collected until they are logged.

    Attributes:
        phase: the current phase of the update, for error messages.
        spent: seconds in all phases since it was last set to 0.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.phase, self.spent = "", 0.0

    def add(self, name: str, value: float) -> None:
        """Adds one value."""
        self.values[name].append(float(value))

    def note(self, name: str, values: Tensor) -> None:
        """Adds the mean of `values`, if there are any."""
        if len(values):
            self.add(name, float(values.float().mean()))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the duration of a phase, in seconds."""
        self.phase, start = phase, time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.add(f"time/{phase}", time.perf_counter() - start)
        self.spent += time.perf_counter() - start

    def describe(self, rollouts: list[Rollout], delimiters: Container[int]) -> None:
        """Adds the lengths of the answers, and how often, where and with which kind they invoke memory."""
        self.note("completions/mean_length", torch.tensor([int(rollout.sampled.sum()) for rollout in rollouts]))
        invocations = [rollout.invocations for rollout in rollouts]
        self.note("invocations/rate", torch.tensor([len(found) for found in invocations]))
        self.note("invocations/answers", torch.tensor([bool(found) for found in invocations]))
        for kind in KINDS:
            self.note(
                f"invocations/{kind}", torch.tensor([sum(i.kind == kind for i in found) for found in invocations])
            )
        # An invocation may come at the start and after every delimiter; a sampled one took a delimiter's place.
        places = len(rollouts) + sum(token in delimiters for r in rollouts for token in r.tokens.tolist())
        sampled = sum(not i.forced for found in invocations for i in found)
        self.add("invocations/per_delimiter", sum(map(len, invocations)) / (places + sampled))
        parts = [int(BINS * i.position / max(len(r.tokens), 1)) for r in rollouts for i in r.invocations]
        for part in range(BINS):
            self.add(f"invocations/position_{part}", parts.count(part) / max(len(parts), 1))

    def means(self, processes: int) -> dict[str, float]:
        """The mean of each metric over all processes, which need not have the same ones; clears the values."""
        own = [{name: sum(values) / len(values) for name, values in self.values.items() if values}]
        self.values.clear()
        everyone = gather_object(own) if processes > 1 else own
        found = {}
        for name in sorted({name for one in everyone for name in one}):
            values = [one[name] for one in everyone if name in one]
            found[name] = round(sum(values) / len(values), 6)
        return found


class Samples:
    """`completions.jsonl` of a run: some completions with their memory marks, their rewards and the baseline's."""

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / "completions.jsonl"

    def keep(self, step: int, rows: list[Row], texts: list[str], rewards: list[float], baselines: list[float]) -> None:
        """Appends one completion for each of `rows`."""
        entries = []
        for row, text, reward, baseline in zip(rows, texts, rewards, baselines, strict=True):
            said = [part["text"] for part in row.prompt[-1]["content"] if part.get("type") == "text"]
            entry = {"step": step, "id": row.id, "question": " ".join(said), "completion": text}
            entries.append({**entry, "answer": row.answer, "reward": round(reward, 4), "baseline": round(baseline, 4)})
        jsonl.append(self.file, entries)

    def forget_from(self, step: int) -> None:
        """Drops what was written from `step` on: a run that resumes there writes it again."""
        if self.file.is_file():
            jsonl.write(self.file, [entry for entry in jsonl.read(self.file) if entry.get("step", 0) < step])
