"""Trains, loads and runs the methods of an evaluation.

Everything is saved. Trained steps are in folders named after their settings, so methods share common steps and a
stopped run resumes. Answers are in record files; tables made from those need neither weights nor training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vismem import checkpoint as memory_files
from vismem.data import Row, load_dataset_rows
from vismem.evaluation.answering import answer
from vismem.evaluation.records import Record, RecordFile, merged_answers
from vismem.evaluation.settings import ADAPTER_FILE, POCKET, Benchmark, EvaluationSettings, Method
from vismem.loading import device_of, load_base
from vismem.model import VisMem
from vismem.training.baselines import load_adapter
from vismem.training.rewards import load_rewards
from vismem.training.run import train

log = logging.getLogger(__name__)


class DryRunFinishedError(Exception):
    """Ends a table in a dry run, once everything that it needs has been checked."""


class Runs:
    """The methods of one evaluation, and their answers.

    Attributes:
        dry_run: whether tables only check what they need, and then raise `DryRunFinishedError`.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings, self.dry_run = settings, False
        self._held: tuple[Any, VisMem] | None = None  # the model that was used last
        self._rows: dict[tuple[str, bool], list[Row]] = {}
        self._unread: dict[str, list[Record]] = {}  # by benchmark, questions that cannot be read
        self.answers = Path(settings.output_dir) / "answers"
        self._merged = merged_answers(self.answers)

    # Training and loading.

    def artefact(self, method: Method, seed: int | None) -> Path | None:
        """The folder of a method's memory or adapter, trained first if necessary; None for the base alone."""
        if method.checkpoint:
            place = Path(method.checkpoint.replace("{seed}", str(seed))).expanduser()
            return place if (place / ADAPTER_FILE).is_file() else memory_files.locate(str(place))
        made = None
        for count in range(1, len(method.train) + 1):
            made = self.train(method.train[:count], seed, made)
        return made

    def train(self, steps: Sequence[Mapping[str, Any]], seed: int | None, before: Path | None) -> Path:
        """Trains the last of some steps and returns its folder."""
        step = {**steps[-1]}
        name = step.pop("step")
        digest = hashlib.sha256(json.dumps([self.settings.training, list(map(dict, steps)), seed]).encode()).hexdigest()
        folder = self.settings.runs / f"{name}-seed{seed}-{digest[:10]}"
        changes = {**step, "seed": seed, "output_dir": str(folder), "report_to": "none"}
        if before is not None:
            changes["checkpoint"] = str(before)
        return train(name, [dict(self.settings.training), changes], resume=True)

    def model(self, method: Method, seed: int | None) -> VisMem:
        """The base with the method's memory or adapter; the last one is cached."""
        key = (method.checkpoint, json.dumps(list(map(dict, method.train))), seed if method.seeded else None)
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = (key, self.load(self.artefact(method, seed)))
        return self._held[1]

    def load(self, folder: Path | None) -> VisMem:
        """Loads a model with the memory or adapter in a folder, or with an untrained memory."""
        settings, name = self.settings, self.settings.base
        if not name and folder is not None and (folder / memory_files.CONFIG_FILE).is_file():
            name = memory_files.base_location(memory_files.read_record(folder), folder)
        if not name:
            raise ValueError("no base: set base=NAME_OR_FOLDER")
        device = device_of(settings.device)
        options = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
        base, processor = load_base(
            name,
            device=device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            say=log.info,
            **options,
        )
        if folder is not None and not (folder / ADAPTER_FILE).is_file():
            return VisMem.from_pretrained(folder, base=base, processor=processor)
        model = VisMem(base, processor).eval()
        if folder is not None:
            load_adapter(model, folder)
        return model

    # Answering.

    def rows(self, benchmark: Benchmark, *, bound: bool = False) -> list[Row]:
        """A benchmark's questions."""
        key = (str(benchmark), bound)
        if key in self._rows:
            return self._rows[key]
        limit = benchmark.limit or self.settings.limit
        source, _, suite = benchmark.data.partition(":")
        if source == POCKET:
            from vismem.pocket.suites import rows as suite_rows

            rows = suite_rows(suite, self.settings.n, self.settings.question_seed, bound=bound)[:limit]
        else:
            found: Any = load_dataset_rows(
                benchmark.data, split=benchmark.split, limit=limit, columns=benchmark.columns, max_bad_rows=None
            )
            rows = list(found.good())
            if not rows:
                raise found.reports.no_good_row()
            self._unread[benchmark.name] = [Record.failed(row_id, why) for row_id, why in found.reports.found]
        self._rows[key] = rows
        return rows

    def has(self, method: Method, benchmark: Benchmark) -> bool:
        """Whether the method can answer it: a bound exists only for some suites of the pocket world."""
        if not method.bound:
            return True
        source, _, suite = benchmark.data.partition(":")
        if source != POCKET:
            return False
        from vismem.pocket.suites import SUITES

        return suite not in SUITES or bool(SUITES[suite].bound)  # an unknown suite is rejected when it is read

    def seeds(self, method: Method) -> tuple[int | None, ...]:
        """The method's seeds; (None,) if it has none."""
        return self.settings.seeds if method.seeded else (None,)

    def records(self, method: Method, benchmark: Benchmark, seed: int | None) -> list[Record]:
        """The method's records; answers what an earlier run did not.

        The records of an lmms-eval task are saved when all its samples are answered.
        """
        file = self.file(method, benchmark, seed)
        settings: dict[str, Any] = {
            "invocation": method.policy,
            "batch_size": self.settings.batch_size,
            "max_new_tokens": self.tokens(benchmark),
        }
        if benchmark.task:
            from vismem.evaluation.lmms.run import task_records

            if not file.records:
                model, limit = self.model(method, seed), benchmark.limit or self.settings.limit
                file.add_all(task_records(model, benchmark.task, limit=limit, **settings))
            return list(file.records.values())
        rows = self.rows(benchmark, bound=method.bound)
        if any(row.id not in file.records for row in rows):
            settings |= {"store": file, "label": f"{method.name}, {benchmark.name}", "keep": ()}
            answer(self.model(method, seed), rows, benchmark.rewards, **settings)
        return [file.records[row.id] for row in rows] + self._unread.get(benchmark.name, [])

    def check(self, method: Method, benchmark: Benchmark, seed: int | None) -> None:
        """Checks what the answers need besides a model: questions, and the scoring of missing answers.

        Raises:
            ValueError: if questions cannot be read, saved answers are of other settings, or a reward, a task or a
                package is missing.
        """
        file = self.file(method, benchmark, seed)
        if benchmark.task:
            if not file.records:
                check_task(benchmark.task)
        elif any(row.id not in file.records for row in self.rows(benchmark, bound=method.bound)):
            load_rewards(benchmark.rewards)

    def tokens(self, benchmark: Benchmark) -> int:
        """Maximum number of sampled tokens per answer."""
        return benchmark.max_new_tokens or self.settings.max_new_tokens

    def file(self, method: Method, benchmark: Benchmark, seed: int | None) -> RecordFile:
        """The file of the method's answers. Raises ValueError if it was written with other settings."""
        regrouped = ("ability", "limit", "subtask")  # number and grouping of the questions may change
        asked = {name: value for name, value in asdict(benchmark).items() if name not in regrouped and value}
        if benchmark.data.partition(":")[0] == POCKET:
            asked |= {"n": self.settings.n, "question_seed": self.settings.question_seed}
        settings = {
            "base": self.settings.base,
            "checkpoint": method.checkpoint,
            "train": list(map(dict, method.train)),
            "invocation": method.policy,
            "bound": method.bound,
            "seed": seed,
            "max_new_tokens": self.tokens(benchmark),
            "benchmark": asked,
        }
        place = "base" if seed is None else f"seed{seed}"
        path = self.answers / slug(method.name) / f"{slug(benchmark.name)}-{slug(method.policy)}-{place}.jsonl"
        return RecordFile(path, settings, self._merged.get(path))

    def subtasks(self, benchmark: Benchmark, records: Sequence[Record]) -> list[str]:
        """The sub-task of each record: a column of its question, or of an lmms-eval sample.

        For a question that cannot be read it is "unread".
        """
        if benchmark.task:
            return [str(record.columns.get(benchmark.subtask, "")) for record in records]
        columns = {row.id: row.columns for row in self.rows(benchmark)}
        unread = {benchmark.subtask: "unread"}
        return [str(columns.get(record.id, unread).get(benchmark.subtask, "")) for record in records]


@cache
def check_task(name: str) -> None:
    """Raises ValueError if lmms-eval or the task is missing."""
    if find_spec("lmms_eval") is None:
        raise ValueError(f"the task {name!r} needs lmms-eval: pip install 'vismem[eval]'")
    from vismem.evaluation.lmms.run import find_task, quiet

    with quiet():
        find_task(name)


def slug(text: str) -> str:
    """A name made safe for files and folders."""
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-")
