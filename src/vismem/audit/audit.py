"""The audit from beginning to end: questions asked, memories replaced, read and compared; all of it kept as it comes.

A stopped run goes on: answers and replays lie in JSON Lines files, the intact answers' tensors in `bank/`. Numbers go
to `audit.json`, the page to `report.html`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch
import transformers

from vismem import __version__, files
from vismem.audit.activations import Bank
from vismem.audit.attention import gazes, watch
from vismem.audit.effects import effect, overview
from vismem.audit.interventions import Intervention, possible, replaced
from vismem.audit.names import CONTENT_FREE, INTACT, INTERVENTIONS, OFF
from vismem.audit.probes import probe_kinds
from vismem.audit.reference import intact_answers
from vismem.audit.replay import Lines, replay
from vismem.audit.report import write_report
from vismem.audit.statistics import change
from vismem.audit.structure import Map, structure
from vismem.audit.targets import targets
from vismem.audit.verdicts import THRESHOLDS, Verdict, verdicts
from vismem.config import KINDS
from vismem.data import Row
from vismem.decoding.policies import Policy
from vismem.evaluation.answering import answer, answerable
from vismem.evaluation.records import Record, RecordFile
from vismem.model import VisMem
from vismem.training.rewards import Rewards

log = logging.getLogger(__name__)
FEWEST_OF_KIND = 10  # questions; with fewer, a kind is not replaced by itself


@dataclass(frozen=True)
class Options:
    """What is audited, and how.

    Args:
        out: folder of everything that is written.
        n: questions whose memories are replaced: the first of the rows. The others are answered once.
        invocation: as for `vismem.evaluation.answering.answer`.
        batch_size: answers written or read together.
        max_new_tokens: sampled tokens per answer.
        seed: of noise, shuffles, folds, and of which other row stands in.
        probe: columns that probes read besides `attributes`.
        interventions: names; all by default.
        map: how memories are laid out in two dimensions.
        about: what the results say of model and data, by name.
    """

    out: Path
    n: int = 128
    invocation: str | Policy = "learned"
    batch_size: int = 16
    max_new_tokens: int = 256
    seed: int = 0
    probe: tuple[str, ...] = ()
    interventions: tuple[str, ...] = INTERVENTIONS
    map: Map = "pca"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be 1 or more, got {self.n}")
        for name in self.interventions:
            Intervention(name)


def audit(
    model: VisMem, rows: Sequence[Row], rewards: Rewards, options: Options, unread: Sequence[Record] = ()
) -> dict[str, Any]:
    """Audits a memory, and writes numbers and a page.

    Questions that the model's processor refuses are left out and listed in the results, as `failed`.

    Args:
        model: base and memory.
        rows: all rows of the reference pass; the first `options.n` are those whose memories are replaced. Their ids
            must differ.
        rewards: what scores the answers.
        options: the rest.
        unread: records of rows that cannot be read, which are listed too.

    Returns:
        What `audit.json` holds: `settings`, `overview`, `effects`, `gaze`, `probes`, `structure`, `verdicts`, ...

    Raises:
        ValueError: if there is no row that can be asked, two rows share an id, or the folder holds results of other
            settings.
        FolderInUseError: if another run writes into the folder.
    """
    rows, failed = answerable(model, rows)
    if not rows:
        why = f"; the first: {failed[0].id}: {failed[0].error}" if failed else ""
        raise ValueError(f"there is no question to audit with{why}")
    for record in failed:
        log.warning("audit: left out a question: %s: %s", record.id, record.error)
    if len({row.id for row in rows}) < len(rows):
        raise ValueError("two questions have the same id; ids must differ")
    with files.locked(options.out):
        return Audit(model, rows, rewards, options, [*unread, *failed]).run()


class Audit:
    """One audit under way; `audit` is the way in."""

    def __init__(
        self, model: VisMem, rows: Sequence[Row], rewards: Rewards, options: Options, failed: Sequence[Record] = ()
    ) -> None:
        self.failed = failed
        self.model, self.rewards, self.options, self.out = model, rewards, options, Path(options.out)
        self.bank = Bank(model, rows, self.out / "bank", options.seed, 2 * options.batch_size)
        self.asked = [row.id for row in rows[: options.n]]
        self.settings = {
            **options.about,
            "memory": fingerprint(model),
            "rows": of_rows(self.bank),
            "rewards": list(rewards.names),
            "invocation": str(options.invocation),
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        }
        self.writing = {
            "invocation": options.invocation,
            "batch_size": options.batch_size,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        }
        self.started, self.worked, self.left = time.monotonic(), 0, 0

    def run(self) -> dict[str, Any]:
        """Everything, in order."""
        options, bank = self.options, self.bank
        records = self.intact()
        intact = {record.id: record for record in records[: len(self.asked)]}
        todo = self.planned()
        self.left = sum(len(ids) for _, ids in todo) + 3 * len(self.asked)  # off, replays and attention
        self.note("intact answers", 0)
        off = self.answers(OFF, None, self.asked)
        others = {one.label: self.answers(one.label, one, ids) for one, ids in todo}
        shifts = self.shifts()
        gaze = self.gaze()
        ids = [row.id for row in bank.rows]
        wanted = targets(bank.rows, options.probe, options.seed)
        likeness = structure(bank, ids, wanted, options.map, options.seed)
        files.write_json(self.out / "maps.json", {"ids": ids, "maps": likeness.pop("maps")}, indent=1)
        result: dict[str, Any] = {
            "settings": {**self.settings, "questions": len(self.asked), "reference": len(records)},
            "failed": {record.id: record.error for record in self.failed},
            "machine": machine(),
            "thresholds": asdict(THRESHOLDS),
            "overview": overview(list(intact.values()), off, bank),
            "effects": self.effects(todo, intact, off, others, shifts),
            "checks": {"formed again": formed_again(shifts)},
            "gaze": gaze,
            "probes": probe_kinds(bank, wanted, ids, options.seed),
            "structure": likeness,
        }
        result["verdicts"] = [verdict.to_dict() for verdict in verdicts(result)]
        files.write_json(self.out / "audit.json", result, indent=1)
        write_report(result, bank, {INTACT: intact, OFF: off, **others}, self.out)
        return result

    def intact(self) -> list[Record]:
        """The reference pass: intact answers of all rows."""
        store = RecordFile(self.out / f"{INTACT}.jsonl", self.settings)
        earlier = len(store.done)
        records = intact_answers(self.bank, self.rewards, store, label="audit: intact", **self.writing)
        self.worked += len(records) - earlier
        return records

    def planned(self) -> list[tuple[Intervention, list[str]]]:
        """Interventions and the rows that each has something to replace in.

        A kind is replaced by itself where both are invoked often enough. An answer that invoked nothing is written as
        before whatever memories hold, so it is not written again.
        """
        often = {k: sum(bool(self.bank.entries[i].of_kind(k)) for i in self.asked) for k in KINDS}
        parts = [KINDS] + ([(kind,) for kind in KINDS] if min(often.values()) >= FEWEST_OF_KIND else [])
        found = []
        for kinds in parts:
            for name in self.options.interventions:
                one = Intervention(name, kinds)
                found.append((one, [i for i in self.asked if possible(self.bank, one, i)]))
        return found

    def answers(self, label: str, intervention: Intervention | None, ids: Sequence[str]) -> dict[str, Record]:
        """The rows' answers with memory replaced, or without memory, by id."""
        if not ids:
            return {}
        store = RecordFile(self.out / f"{label}.jsonl", {**self.settings, "condition": label})
        rows, more = [self.bank.row(i) for i in ids], {"store": store, "label": f"audit: {label}"}
        earlier = len(store.done)
        if intervention is None:
            records = answer(self.model, rows, self.rewards, **{**self.writing, "invocation": OFF}, **more)
        else:
            with replaced(self.bank, intervention):
                records = answer(self.model, rows, self.rewards, **self.writing, **more)
        self.note(label, len(rows), earlier)
        return {record.id: record for record in records}

    def shifts(self) -> dict[str, dict[str, Any]]:
        """The replays' lines by row."""
        names = list(self.options.interventions)
        lines = Lines(self.out / "replay.jsonl", {**self.settings, "interventions": names})
        earlier = len(lines.rows)
        replay(self.bank, names, self.asked, lines, self.options.batch_size, "audit: replays")
        self.note("replays", len(self.asked), earlier)
        return lines.rows

    def gaze(self) -> dict[str, dict[str, Any]]:
        """Attention to the slots by kind, or why there is none."""
        lines = Lines(self.out / "attention.jsonl", self.settings)
        earlier = len(lines.rows)
        try:
            watch(self.bank, self.asked, lines, self.options.batch_size, "audit: attention")
        except ValueError as error:  # a base whose layers are not all attention
            invoked = [kind for kind in KINDS if any(self.bank.entries[i].of_kind(kind) for i in self.asked)]
            return {kind: {"n": 0, "why": str(error)} for kind in invoked}
        self.note("attention", len(self.asked), earlier)
        return gazes(lines.rows, self.bank)

    def effects(
        self,
        todo: Sequence[Any],
        intact: dict[str, Any],
        off: dict[str, Any],
        found: dict[str, Any],
        shifts: dict[str, Any],
    ) -> dict[str, list[dict[str, Any]]]:
        """Rows of the tables, by `"all"` and, where each was replaced by itself, by kind."""
        parts: dict[str, list[dict[str, Any]]] = {}
        for one, _ in todo:
            name = "all" if one.kinds == KINDS else one.kinds[0]
            if name not in parts:
                parts[name] = [effect(None, intact, off, {}, self.bank, one.kinds)]
            row = effect(one, intact, found[one.label], shifts, self.bank)
            if one.name in CONTENT_FREE and row["n"]:
                ids = [i for i in found[one.label] if i in off]
                groups = [self.bank.image[i] or i for i in ids]
                scores = ([found[one.label][i].score for i in ids], [off[i].score for i in ids])
                row["over_off"] = change(*scores, groups).to_dict()
            parts[name].append(row)
        return parts

    def note(self, done: str, rows: int, earlier: int = 0) -> None:
        """Says what is done, and about how long the rest will take, by the rows that were worked on so far."""
        self.left -= rows
        self.worked += rows - earlier
        if not self.worked:
            log.info("audit: %s found from an earlier run", done)
            return
        rest = (time.monotonic() - self.started) / self.worked * max(self.left, 0)
        log.info("audit: %s done, about %s left", done, f"{rest:.0f} s" if rest < 90 else f"{rest / 60:.0f} min")


def of_rows(bank: Bank) -> str:
    """Tells questions from others: their ids, words, answers and images."""
    told = [(row.id, row.prompt, row.answer, bank.image[row.id]) for row in bank.rows]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def formed_again(lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far memories that were formed once more from the bank are from those that the answers were written with."""
    far = [shift["moved"] for line in lines.values() for shift in line["shifts"] if shift["name"] == INTACT]
    return {"memories": len(far), "furthest": max(far, default=None)}


def fingerprint(model: VisMem) -> str:
    """Tells a memory's weights from others."""
    digest = hashlib.sha256()
    for part in (model.memory, model.tokens):
        for name, weight in sorted(part.state_dict().items()):
            digest.update(name.encode() + weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    versions = {each.__name__: each.__version__ for each in (torch, transformers, sklearn, numpy)}
    return {
        "vismem": __version__,
        "python": platform.python_version(),
        **versions,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


__all__ = ["Audit", "Options", "Verdict", "audit"]
