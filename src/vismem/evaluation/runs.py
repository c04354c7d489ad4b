"""Methods made, loaded and asked: trains what is not there yet, loads base and memory, answers benchmarks.

Everything is kept: trained steps lie in folders named after their settings, so that methods share what they have in
common and a stopped run goes on; answers lie in record files, and whoever has those needs neither weights nor training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vismem import checkpoint as memory_files
from vismem.data import Row, load_dataset_rows
from vismem.decoding.invocation import Policy, read_policy
from vismem.evaluation.answering import answer
from vismem.evaluation.records import Record, RecordFile
from vismem.evaluation.settings import ADAPTER_FILE, POCKET, Benchmark, Method, Settings
from vismem.loading import device_of, load_base
from vismem.model import VisMem
from vismem.training.arguments import check_names
from vismem.training.baselines import load_adapter
from vismem.training.run import train

log = logging.getLogger(__name__)


class Runs:
    """The methods of one evaluation, and their answers.

    Args:
        settings: of the evaluation.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._held: tuple[Any, VisMem] | None = None  # the model that was asked last
        self._rows: dict[tuple[Benchmark, bool], list[Row]] = {}

    # Making.

    def artefact(self, method: Method, seed: int | None) -> Path | None:
        """The folder of a method's memory or adapter, trained first where it has to be; None for the base alone."""
        if method.checkpoint:
            return memory_files.locate(method.checkpoint.format(seed=seed))
        made = None
        for count in range(1, len(method.train) + 1):
            made = self.train(method.train[:count], seed, made)
        return made

    def train(self, steps: Sequence[Mapping[str, Any]], seed: int | None, before: Path | None) -> Path:
        """Runs the last of some steps; returns what it made."""
        step = {**steps[-1]}
        name = step.pop("step")
        digest = hashlib.sha256(json.dumps([self.settings.training, list(map(dict, steps)), seed]).encode()).hexdigest()
        folder = self.settings.runs / f"{name}-seed{seed}-{digest[:10]}"
        changes = {**step, "seed": seed, "output_dir": str(folder), "report_to": "none"}
        if before is not None:
            changes["checkpoint"] = str(before)
        check_names({**self.settings.training, **changes})
        return train(name, [dict(self.settings.training), changes], resume=True)

    # Loading.

    def model(self, method: Method, seed: int | None) -> VisMem:
        """The base with the method's memory or adapter; the one asked last is kept."""
        key = (method.checkpoint, json.dumps(list(map(dict, method.train))), seed if method.seeded else None)
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = (key, self.load(self.artefact(method, seed)))
        return self._held[1]

    def load(self, folder: Path | None) -> VisMem:
        """A model of its own with the memory or adapter in a folder, or with an untrained memory."""
        settings, name = self.settings, self.settings.base
        if not name and folder is not None and (folder / memory_files.CONFIG_FILE).is_file():
            name = memory_files.base_location(memory_files.read_record(folder).base_name)
        if not name:
            raise ValueError("no base: set base=NAME_OR_FOLDER")
        device = device_of(settings.device)
        base, processor = load_base(name, device, settings.dtype, settings.trust_remote_code, log.info)
        if settings.attn_implementation:
            base.set_attn_implementation(settings.attn_implementation)
        if folder is not None and not (folder / ADAPTER_FILE).is_file():
            return VisMem.from_pretrained(folder, base=base, processor=processor)
        model = VisMem(base, processor).eval()
        if folder is not None:
            load_adapter(model, folder)
        return model

    # Asking.

    def rows(self, benchmark: Benchmark, bound: bool = False) -> list[Row]:
        """A benchmark's questions."""
        key = (replace(benchmark, rewards=str(benchmark.rewards)), bound)
        if key not in self._rows:
            self._rows[key] = self._read(benchmark, bound)
        return self._rows[key]

    def _read(self, benchmark: Benchmark, bound: bool) -> list[Row]:
        settings = self.settings
        limit = benchmark.limit if benchmark.limit is not None else settings.limit
        source, _, suite = benchmark.data.partition(":")
        if source == POCKET:
            from vismem.pocket.suites import rows

            return rows(suite, settings.n, settings.question_seed, bound)[:limit]
        found: Any = load_dataset_rows(benchmark.data, split=benchmark.split, limit=limit)
        return [found[index] for index in range(len(found))]

    def has(self, method: Method, benchmark: Benchmark) -> bool:
        """Whether the method can be asked: a bound exists in the pocket world only, and not for all of its suites."""
        if not method.bound:
            return True
        source, _, suite = benchmark.data.partition(":")
        if source != POCKET:
            return False
        from vismem.pocket.suites import SUITES

        return bool(SUITES[suite].bound)

    def seeds(self, method: Method) -> tuple[int | None, ...]:
        """Seeds that the method has; (None,) for one without."""
        return self.settings.seeds if method.seeded else (None,)

    def records(self, method: Method, benchmark: Benchmark, seed: int | None) -> list[Record]:
        """The method's answers, written now as far as an earlier run did not."""
        invocation = method.policy
        tokens = benchmark.max_new_tokens or self.settings.max_new_tokens
        apart = ("ability", "limit", "subtask")  # which questions are asked, and how they are grouped, may change
        asked = {name: value for name, value in asdict(benchmark).items() if name not in apart and value}
        if benchmark.data.partition(":")[0] == POCKET:
            asked |= {"n": self.settings.n, "question_seed": self.settings.question_seed}
        known: dict[str, Any] = {
            "base": self.settings.base,
            "checkpoint": method.checkpoint,
            "train": list(map(dict, method.train)),
        }
        known |= {"invocation": invocation, "bound": method.bound, "seed": seed, "max_new_tokens": tokens}
        known |= {"benchmark": asked}
        place = "base" if seed is None else f"seed{seed}"
        folder = Path(self.settings.output_dir) / "answers" / slug(method.name)
        file = RecordFile(folder / f"{slug(benchmark.name)}-{slug(invocation)}-{place}.jsonl", known)
        if benchmark.task:
            return self.task_records(method, benchmark, seed, invocation, tokens, file)
        rows = self.rows(benchmark, method.bound)
        if any(row.id not in file.done for row in rows):
            model = self.model(method, seed)
            answer(
                model,
                rows,
                list(benchmark.rewards) if isinstance(benchmark.rewards, (list, tuple)) else benchmark.rewards,
                invocation=policy_of(invocation),
                batch_size=self.settings.batch_size,
                max_new_tokens=tokens,
                store=file,
                label=f"{method.name}, {benchmark.name}",
                keep=(),
            )
        return [file.records[row.id] for row in rows]

    def subtasks(self, benchmark: Benchmark, records: Sequence[Record]) -> list[str]:
        """The sub-task of each record: a column of its question, or of the sample of a task of lmms-eval."""
        if benchmark.task:
            return [str(record.columns.get(benchmark.subtask, "")) for record in records]
        columns = {row.id: row.columns for row in self.rows(benchmark)}
        return [str(columns[record.id].get(benchmark.subtask, "")) for record in records]

    def task_records(
        self, method: Method, benchmark: Benchmark, seed: int | None, invocation: str, tokens: int, file: RecordFile
    ) -> list[Record]:
        """The same of a task of lmms-eval, whose file is written when all its samples are there."""
        from vismem.evaluation.lmms.run import task_records

        if not file.records:
            asked = {"invocation": invocation, "batch_size": self.settings.batch_size, "max_new_tokens": tokens}
            limit = benchmark.limit if benchmark.limit is not None else self.settings.limit
            file.add(task_records(self.model(method, seed), benchmark.task, limit=limit, **asked))
        return list(file.records.values())


def policy_of(invocation: str) -> str | Policy:
    """The policy of a name as settings have it; `"placed"` is the answering's matter."""
    return invocation if invocation == "placed" else read_policy(invocation)


def slug(text: str) -> str:
    """A name as a file or folder can have it."""
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-")
