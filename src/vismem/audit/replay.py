"""Reads intact answers again with replaced memories: how far the memory moves, and how far the next tokens do.

The answer's tokens stay, so every invocation is compared at the same position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vismem.analysis.replacement import next_token_kl
from vismem.audit.activations import ActivationStore
from vismem.audit.interventions import stand_ins
from vismem.audit.names import INTACT
from vismem.config import KINDS
from vismem.evaluation.records import ResultFile


def replay(
    activations: ActivationStore,
    names: Sequence[str],
    ids: Sequence[str],
    results: ResultFile,
    batch_size: int,
    label: str,
) -> None:
    """Reads answers again under every intervention; skips rows that `results` already has.

    `results` receives for each row `shifts`: a list with `name`, `index`, `kind`, `moved` (distance of the replacement
    from the intact memory, relative to its norm), and `first` and `rest` (KL in nats, see
    `vismem.analysis.replacement.Shift`; None without such tokens). `batch_size` counts each intervention's answer.
    """
    for part in activations.pending(ids, results, max(1, batch_size // max(len(names), 1)), label):
        found: dict[str, list[dict[str, Any]]] = {row_id: [] for row_id in part}
        for shift in batch_shifts(activations, names, part):
            found[shift.pop("id")].append(shift)
        results.append([{"id": row_id, "shifts": shifts} for row_id, shifts in found.items()])


def batch_shifts(activations: ActivationStore, names: Sequence[str], ids: list[str]) -> Iterator[dict[str, Any]]:
    """The shifts of a batch of rows, each with the row's id.

    All interventions are read at once, as copies of an answer, so that each prompt is read once.
    """
    rollouts = [activations.entries[row_id].rollout for row_id in ids]
    vectors = {name: replacements(activations, name, ids) for name in (INTACT, *names)}
    moved = {
        (name, row, index): distance(memory, activations.entries[ids[row]].memory(index))
        for name, found in vectors.items()
        for (row, index), memory in found.items()
    }
    for row, index in vectors[INTACT]:  # formed again, to check that the stored activations are consistent
        kind = rollouts[row].invocations[index].kind
        yield {"id": ids[row], "name": INTACT, "index": index, "kind": kind, "moved": moved[INTACT, row, index]}
    if not names:
        return
    inputs = activations.inputs([activations.row(row_id) for row_id in ids])
    copies = [rollout for rollout in rollouts for _ in names]

    def replace(copy: int, index: int, invocation: Any) -> Tensor:
        row, number = divmod(copy, len(names))
        return vectors[names[number]].get((row, index), invocation.memory)

    for shift in next_token_kl(activations.model, inputs, copies, replace):
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


@torch.no_grad()
def replacements(activations: ActivationStore, name: str, ids: Sequence[str]) -> dict[tuple[int, int], Tensor]:
    """The existing replacements for memories of the rows' intact answers, by row and invocation."""
    found: dict[tuple[int, int], Tensor] = {}
    form = activations.model.memory.form
    for kind in KINDS:
        places = [(row, index) for row, row_id in enumerate(ids) for index in activations.entries[row_id].of_kind(kind)]
        if not places:
            continue
        seen = [activations.observation(ids[row], index) for row, index in places]
        vectors = list(form(kind, seen)) if name == INTACT else stand_ins(activations, form, name, kind, seen)
        found |= {place: memory for place, memory in zip(places, vectors, strict=True) if memory is not None}
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Relative distance between two memories; between their mean vectors if their lengths differ."""
    one, other = one.float().cpu(), other.float().cpu()
    if one.shape != other.shape:
        one, other = one.mean(0), other.mean(0)
    return round(float((one - other).norm() / other.norm().clamp(min=1e-12)), 6)
