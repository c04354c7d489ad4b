"""What a run reports: averages between two logs, sample completions, and warnings when it cannot learn."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from vismem import jsonl
from vismem.config import KINDS
from vismem.data import Row
from vismem.decoding.trace import Rollout

log = logging.getLogger(__name__)

BINS = 5  # of the histogram of where in an answer memory is invoked
PATIENCE = 10  # updates in a row without a signal before a warning
PAGE = "docs/training.md"
REASONS = {  # by signal, what its absence means
    "spread": "there was nothing to learn from: in every group all answers earned the same. Use prompts that the base "
    "sometimes gets right, more trajectories (group_size) or a finer reward",
    "invocations": "memory was never invoked. Check injection_rate, injection_places and memory.delimiters in stage I, "
    "and that stage II starts from a memory that was trained (checkpoint)",
    "gradient": "there was no gradient: no reply invokes memory. Check the replies' tokens, injection_rate and "
    "memory.delimiters",
}


class Metrics:
    """Values by name, collected until they are logged.

    Attributes:
        phase: the current phase of the update, for error messages.
        spent: seconds in all phases since it was last set to 0.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.phase, self.spent = "", 0.0

    def add(self, name: str, value: float | Tensor) -> None:
        """Adds a value, or the mean of a tensor's values if it has any."""
        if isinstance(value, Tensor):
            if not value.numel():
                return
            value = value.float().mean()
        self.values[name].append(float(value))

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
        invocations = [rollout.invocations for rollout in rollouts]
        for name, counts in {
            "completions/mean_length": [int(rollout.sampled.sum()) for rollout in rollouts],
            "invocations/rate": [len(found) for found in invocations],
            "invocations/answers": [bool(found) for found in invocations],
            **{f"invocations/{kind}": [sum(i.kind == kind for i in found) for found in invocations] for kind in KINDS},
        }.items():
            self.add(name, torch.tensor(counts))
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
    """`completions.jsonl` of a run: some completions with their memory tokens, their rewards and the baseline's."""

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


class SignalWatch(TrainerCallback):
    """Counts updates without a learning signal, warns after `PATIENCE` in a row, and summarises at the end.

    Args:
        reduce: sums a tensor over all processes.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self.reduce = reduce
        self.seen: defaultdict[str, float] = defaultdict(float)  # signals of the current update
        self.row, self.total = dict.fromkeys(REASONS, 0), dict.fromkeys(REASONS, 0)
        self.updates = 0

    def add(self, signal: str, value: float) -> None:
        """Adds to one of the signals in `REASONS`, 0 or more."""
        self.seen[signal] += value

    def on_step_end(self, args: Any, state: Any, control: Any, **_given: Any) -> None:  # noqa: ARG002
        names = sorted(self.seen)
        own = torch.tensor([self.seen[name] for name in names], device=args.device)
        values = self.reduce(own).tolist() if names else []
        self.seen.clear()
        self.updates += 1
        for name, value in zip(names, values, strict=True):
            self.row[name] = 0 if value else self.row[name] + 1
            self.total[name] += not value
            if self.row[name] == PATIENCE and state.is_world_process_zero:
                log.warning("warning: in the last %d updates %s (%s)", PATIENCE, REASONS[name], PAGE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_given: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            for name, count in self.total.items():
                if 2 * count >= self.updates > 0:
                    log.warning("warning: in %d of %d updates %s (%s)", count, self.updates, REASONS[name], PAGE)
