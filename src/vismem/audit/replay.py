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
from vismem.audit.activations import ActivationStore, present
from vismem.audit.interventions import former_of, stand_ins
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

    def shift(name: str, row: int, index: int, **more: Any) -> dict[str, Any]:
        intact = rollouts[row].invocations[index]
        moved = distance(vectors[name][row, index], present(intact.memory))
        return {"id": ids[row], "name": name, "index": index, "kind": intact.kind, "moved": moved, **more}

    # Formed again, to check that the stored activations are consistent.
    yield from (shift(INTACT, row, index) for row, index in vectors[INTACT])
    if not names:
        return
    inputs = activations.inputs([activations.row(row_id) for row_id in ids])
    copies = [rollout for rollout in rollouts for _ in names]

    def replace(copy: int, index: int, invocation: Any) -> Tensor:
        row, number = divmod(copy, len(names))
        return vectors[names[number]].get((row, index), invocation.memory)

    for found in next_token_kl(activations.model, inputs, copies, replace):
        row, number = divmod(found.row, len(names))
        if (row, found.index) in vectors[names[number]]:
            rest = None if math.isnan(found.rest) else round(found.rest, 8)
            yield shift(names[number], row, found.index, first=round(found.first, 8), rest=rest)


@torch.no_grad()
def replacements(activations: ActivationStore, name: str, ids: Sequence[str]) -> dict[tuple[int, int], Tensor]:
    """The existing replacements for memories of the rows' intact answers, by row and invocation."""
    found: dict[tuple[int, int], Tensor] = {}
    form = former_of(activations.model)
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
