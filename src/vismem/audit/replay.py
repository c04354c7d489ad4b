"""Intact answers read again with replaced memories: how far the memory moved, and how far the next words did.

The words stay as they were written, so that every invocation is compared at the very same place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vismem import jsonl
from vismem.analysis.replacement import next_token_kl
from vismem.audit.activations import Bank
from vismem.audit.interventions import stand_ins
from vismem.audit.names import INTACT
from vismem.config import Kind
from vismem.evaluation.records import check_settings


class Lines:
    """A JSON Lines file whose first line holds the settings; one line for each row, written as it comes.

    Args:
        path: the file.
        settings: of all lines; plain values.

    Raises:
        ValueError: if the file holds lines of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.rows = path, {}
        settings = json.loads(json.dumps(settings))
        whole = jsonl.read(path) if path.is_file() else []
        if whole:
            check_settings(path, whole[0].get("settings"), settings)
        self.rows = {line["id"]: line for line in whole[1:]}
        jsonl.write(path, [{"settings": settings}, *self.rows.values()])

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Appends lines."""
        new = list(lines)
        jsonl.append(self.path, new)
        self.rows.update((line["id"], line) for line in new)


def replay(bank: Bank, names: Sequence[str], ids: Sequence[str], lines: Lines, batch_size: int, label: str) -> None:
    """Reads answers again under every intervention; what an earlier run has is left out.

    Args:
        bank: the rows' intact answers.
        names: of the interventions.
        ids: of the rows.
        lines: where the numbers go: for each row `"shifts"`, a list with `name`, `index`, `kind`, `moved` (distance
            of the vectors from the intact ones, relative to those), `first` and `rest` (KL in nats, see
            `evaluation.replaying.Shift`; None where there is no such token).
        batch_size: answers read together, each intervention's counted.
        label: for the progress bar.
    """
    invoked = [i for i in ids if any(one.length for one in bank.entries[i].rollout.invocations)]
    todo = [row_id for row_id in invoked if row_id not in lines.rows]
    with tqdm(total=len(invoked), initial=len(invoked) - len(todo), desc=label, delay=2, mininterval=1) as bar:
        for part in bank.batches(todo, max(1, batch_size // max(len(names), 1))):
            found: dict[str, list[dict[str, Any]]] = {row_id: [] for row_id in part}
            for shift in batch_shifts(bank, names, part):
                found[shift.pop("id")].append(shift)
            lines.add({"id": row_id, "shifts": shifts} for row_id, shifts in found.items())
            bar.update(len(part))


def batch_shifts(bank: Bank, names: Sequence[str], ids: list[str]) -> Iterator[dict[str, Any]]:
    """The shifts of a batch of rows, with the row's id in each.

    All interventions are read at once, as copies of an answer to one prompt, so that the prompt is read once for them.
    """
    rollouts = [bank.entries[row_id].rollout for row_id in ids]
    vectors = {name: replacements(bank, name, ids) for name in (INTACT, *names)}
    moved = {
        (name, row, index): distance(memory, rollouts[row].invocations[index].memory)
        for name, found in vectors.items()
        for (row, index), memory in found.items()
    }
    for row, index in vectors[INTACT]:  # formed once more: a check that what the bank holds belongs together
        kind = rollouts[row].invocations[index].kind
        yield {"id": ids[row], "name": INTACT, "index": index, "kind": kind, "moved": moved[INTACT, row, index]}
    if not names:
        return
    inputs = bank.inputs([bank.row(row_id) for row_id in ids])
    copies = [rollout for rollout in rollouts for _ in names]

    def replace(copy: int, index: int, invocation: Any) -> Tensor:
        row, number = divmod(copy, len(names))
        return vectors[names[number]].get((row, index), invocation.memory)

    for shift in next_token_kl(bank.model, inputs, copies, replace):
        row, number = divmod(shift.row, len(names))
        if (row, shift.index) in vectors[names[number]]:
            yield {
                "id": ids[row],
                "name": names[number],
                "index": shift.index,
                "kind": shift.kind,
                "moved": moved[names[number], row, shift.index],
                "first": round(shift.first, 8),
                "rest": None if math.isnan(shift.rest) else round(shift.rest, 8),
            }


def replacements(bank: Bank, name: str, ids: Sequence[str]) -> dict[tuple[int, int], Tensor]:
    """What stands in for the memories of the rows' intact answers, by row and invocation, where anything can."""
    found: dict[tuple[int, int], Tensor] = {}
    form = bank.model.memory.form
    for kind in ("short", "long"):
        places = [(row, index) for row, row_id in enumerate(ids) for index in bank.entries[row_id].of_kind(kind)]
        if not places:
            continue
        seen = [bank.observation(ids[row], index) for row, index in places]
        found |= _formed(bank, form, name, kind, seen, places)
    return found


@torch.no_grad()
def _formed(
    bank: Bank, form: Any, name: str, kind: Kind, seen: list[Any], places: list[Any]
) -> dict[tuple[int, int], Tensor]:
    vectors = list(form(kind, seen)) if name == INTACT else stand_ins(bank, form, name, kind, seen)
    return {place: memory for place, memory in zip(places, vectors, strict=True) if memory is not None}


def distance(one: Tensor, other: Tensor) -> float:
    """How far vectors are from others, relative to those; of other numbers of vectors, by their means."""
    one, other = one.float().cpu(), other.float().cpu()
    if one.shape != other.shape:
        one, other = one.mean(0), other.mean(0)
    return round(float((one - other).norm() / other.norm().clamp(min=1e-12)), 6)
