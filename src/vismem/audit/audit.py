"""Runs the audit: answers questions, replaces, probes and compares memories, and saves everything as it goes.

A stopped run resumes. Answers and replays are in JSON Lines files, the intact answers' tensors in `bank/`; results go
to `audit.json`, the page to `report.html`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch
import transformers

from vismem import __version__, files
from vismem.audit.activations import ActivationStore
from vismem.audit.attention import measure_attention, summarize_attention
from vismem.audit.effects import effect, overview
from vismem.audit.interventions import Intervention, possible, replaced
from vismem.audit.names import INTACT, INTERVENTIONS, OFF
from vismem.audit.probes import probe_kinds
from vismem.audit.reference import intact_answers
from vismem.audit.replay import replay
from vismem.audit.report import write_report
from vismem.audit.structure import Projection, structure
from vismem.audit.targets import targets
from vismem.audit.verdicts import THRESHOLDS, verdicts
from vismem.config import KINDS, Kind
from vismem.data import Row
from vismem.decoding.policies import Policy
from vismem.deprecation import renamed
from vismem.evaluation.answering import answer, answerable
from vismem.evaluation.records import Record, RecordFile, ResultFile
from vismem.model import VisMem
from vismem.training.rewards import Rewards

log = logging.getLogger(__name__)
FEWEST_OF_KIND = 10  # questions; with fewer, no kind is replaced on its own


@dataclass(frozen=True)
class AuditOptions:
    """Options of an audit.

    Args:
        out: output folder.
        n: number of questions whose memories are replaced, from the first row on. The other rows are answered once.
        invocation: see `vismem.evaluation.answering.answer`.
        batch_size: answers written or read together.
        max_new_tokens: sampled tokens per answer.
        seed: of noise, shuffles, folds and the choice of other rows.
        probe: columns to probe for besides `attributes`.
        interventions: names; all by default.
        map: projection of memories to two dimensions.
        about: description of model and data for the results, by name.
    """

    out: str | Path
    n: int = 128
    invocation: str | Policy = "learned"
    batch_size: int = 16
    max_new_tokens: int = 256
    seed: int = 0
    probe: tuple[str, ...] = ()
    interventions: tuple[str, ...] = INTERVENTIONS
    map: Projection = "pca"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be 1 or more, got {self.n}")
        for name in self.interventions:
            Intervention(name)


def audit(
    model: VisMem, rows: Sequence[Row], rewards: Rewards, options: AuditOptions, unread: Sequence[Record] = ()
) -> dict[str, Any]:
    """Audits a memory and writes numbers and a page.

    Questions that the model's processor rejects are skipped and listed in the results under `failed`.

    Args:
        model: base and memory.
        rows: all rows of the reference pass, with distinct ids; the first `options.n` have their memories replaced.
        rewards: score the answers.
        options: the options.
        unread: records of rows that could not be read, listed under `failed` too.

    Returns:
        The contents of `audit.json`: `settings`, `overview`, `effects`, `gaze`, `probes`, `structure`, `verdicts`, ...

    Raises:
        ValueError: if no row can be answered, two rows share an id, or the folder holds results of other settings.
        FolderInUseError: if another run writes into the folder.
    """
    rows, failed = answerable(model, rows)
    if not rows:
        why = f"; the first: {failed[0].id}: {failed[0].error}" if failed else ""
        raise ValueError(f"no question to audit{why}")
    for record in failed:
        log.warning("audit: skipped a question: %s: %s", record.id, record.error)
    with files.locked(options.out):
        return Audit(model, rows, rewards, options, [*unread, *failed]).run()


class Audit:
    """A running audit; call `audit` to create one."""

    def __init__(
        self, model: VisMem, rows: Sequence[Row], rewards: Rewards, options: AuditOptions, failed: Sequence[Record]
    ) -> None:
        self.model, self.rewards, self.options, self.failed = model, rewards, options, failed
        self.out = Path(options.out)
        self.activations = ActivationStore(model, rows, self.out / "bank", options.seed, 2 * options.batch_size)
        self.asked = [row.id for row in rows[: options.n]]
        self.settings = {
            **options.about,
            "memory": memory_digest(model),
            "rows": rows_digest(self.activations),
            "rewards": list(rewards.names),
            "invocation": str(options.invocation),
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        }
        self.generation: dict[str, Any] = {
            "invocation": options.invocation,
            "batch_size": options.batch_size,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        }
        self.started, self.done, self.remaining = time.monotonic(), 0, 0

    def run(self) -> dict[str, Any]:
        """Runs all steps in order."""
        options, activations, asked = self.options, self.activations, self.asked
        store = RecordFile(self.out / f"{INTACT}.jsonl", self.settings)
        earlier = len(store.records)
        records = intact_answers(activations, self.rewards, store, label="audit: intact", **self.generation)
        self.done = len(records) - earlier
        intact = {record.id: record for record in records[: len(asked)]}
        parts = self.parts()
        planned = {
            one: [i for i in asked if possible(activations, one, i)]
            for kinds in parts.values()
            for one in (Intervention(name, kinds) for name in options.interventions)
        }
        self.remaining = sum(map(len, planned.values())) + 3 * len(asked)  # off, replays and attention
        self.log_progress("intact answers", 0)
        off = self.answers(OFF, asked)
        others = {one: self.answers(one.label, ids, one) for one, ids in planned.items()}
        shifts = self.replays()
        attention = self.attention()
        ids = [row.id for row in activations.rows]
        wanted = targets(activations.rows, options.probe, options.seed)
        similarity = structure(activations, ids, wanted, options.map, options.seed)
        files.write_json(self.out / "maps.json", {"ids": ids, "maps": similarity.pop("maps")}, indent=1)
        result: dict[str, Any] = {
            "settings": {**self.settings, "questions": len(asked), "reference": len(records)},
            "failed": {record.id: record.error for record in self.failed},
            "machine": machine(),
            "thresholds": asdict(THRESHOLDS),
            "overview": overview(list(intact.values()), off, activations),
            "effects": {
                name: [
                    effect(OFF, kinds, intact, off, activations),
                    *(
                        effect(one.name, kinds, intact, found, activations, shifts, off)
                        for one, found in others.items()
                        if one.kinds == kinds
                    ),
                ]
                for name, kinds in parts.items()
            },
            "checks": {"formed again": reforming_error(shifts)},
            "gaze": attention,
            "probes": probe_kinds(activations, wanted, ids, options.seed),
            "structure": similarity,
        }
        result["verdicts"] = [asdict(verdict) for verdict in verdicts(result)]
        files.write_json(self.out / "audit.json", result, indent=1)
        answers = {one.name: found for one, found in others.items() if one.kinds == KINDS}
        write_report(result, activations, {INTACT: intact, OFF: off, **answers}, self.out)
        return result

    def parts(self) -> dict[str, tuple[Kind, ...]]:
        """The kinds to replace: both together, and each on its own if both were invoked often enough."""
        entries = [self.activations.entries[i] for i in self.asked]
        often = min(sum(bool(entry.of_kind(kind)) for entry in entries) for kind in KINDS) >= FEWEST_OF_KIND
        return {"all": KINDS, **({kind: (kind,) for kind in KINDS} if often else {})}

    def answers(self, label: str, ids: Sequence[str], intervention: Intervention | None = None) -> dict[str, Record]:
        """The rows' answers by id, with memory replaced, or off without an intervention."""
        if not ids:
            return {}
        store = RecordFile(self.out / f"{label}.jsonl", {**self.settings, "condition": label})
        earlier = len(store.records)
        settings = {**self.generation, "store": store, "label": f"audit: {label}"}
        if intervention is None:
            settings["invocation"] = OFF
        with replaced(self.activations, intervention) if intervention else nullcontext():
            records = answer(self.model, [self.activations.row(i) for i in ids], self.rewards, **settings)
        self.log_progress(label, len(ids), earlier)
        return {record.id: record for record in records}

    def replays(self) -> dict[str, dict[str, Any]]:
        """The replays' results by row."""
        names = list(self.options.interventions)
        results = ResultFile(self.out / "replay.jsonl", {**self.settings, "interventions": names})
        earlier = len(results.rows)
        replay(self.activations, names, self.asked, results, self.options.batch_size, "audit: replays")
        self.log_progress("replays", len(self.asked), earlier)
        return results.rows

    def attention(self) -> dict[Kind, dict[str, Any]]:
        """Attention to the slots by kind, or the reason why it cannot be measured."""
        results = ResultFile(self.out / "attention.jsonl", self.settings)
        earlier = len(results.rows)
        try:
            measure_attention(self.activations, self.asked, results, self.options.batch_size, "audit: attention")
        except ValueError as error:  # not all layers of the base are attention
            invoked = [kind for kind in KINDS if any(self.activations.entries[i].of_kind(kind) for i in self.asked)]
            return {kind: {"n": 0, "why": str(error)} for kind in invoked}
        self.log_progress("attention", len(self.asked), earlier)
        return summarize_attention(results.rows, self.activations)

    def log_progress(self, step: str, rows: int, earlier: int = 0) -> None:
        """Logs a finished step and the estimated time left."""
        self.remaining -= rows
        self.done += rows - earlier
        if not self.done:
            log.info("audit: %s found from an earlier run", step)
            return
        rest = (time.monotonic() - self.started) / self.done * max(self.remaining, 0)
        log.info("audit: %s done, about %s left", step, f"{rest:.0f} s" if rest < 90 else f"{rest / 60:.0f} min")


def rows_digest(activations: ActivationStore) -> str:
    """A hash of the questions: ids, prompts, answers and images."""
    parts = [(row.id, row.prompt, row.answer, activations.image[row.id]) for row in activations.rows]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def reforming_error(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far memories formed again from the stored activations are from those the answers were written with."""
    far = [shift["moved"] for row in results.values() for shift in row["shifts"] if shift["name"] == INTACT]
    return {"memories": len(far), "furthest": max(far, default=None)}


def memory_digest(model: VisMem) -> str:
    """A hash of a memory's weights."""
    digest = hashlib.sha256()
    for part in (model.memory, model.tokens):
        for name, weight in sorted(part.state_dict().items()):
            digest.update(name.encode() + weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Library versions and hardware, for the results."""
    versions = {each.__name__: each.__version__ for each in (torch, transformers, sklearn, numpy)}
    return {
        "vismem": __version__,
        "python": platform.python_version(),
        **versions,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


__getattr__ = renamed(__name__, {"Options": "AuditOptions"})
