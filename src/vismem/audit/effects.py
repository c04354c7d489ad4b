"""Effects of replacing memories: accuracy, answers and next tokens compared with the intact ones, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vismem.audit.activations import ActivationStore
from vismem.audit.interventions import Intervention, possible
from vismem.audit.names import OFF
from vismem.audit.statistics import accuracy, average, change, share
from vismem.config import KINDS
from vismem.evaluation.records import Record


def overview(records: Sequence[Record], others: Mapping[str, Record], activations: ActivationStore) -> dict[str, Any]:
    """Accuracy with and without memory over all questions, and how often memory was invoked."""
    groups = [activations.group(r.id) for r in records]
    invoked = [bool(r.invocations) for r in records]
    found: dict[str, Any] = {"n": len(records), "images": len(set(groups))}
    found["accuracy"] = accuracy([r.score for r in records], groups).to_dict()
    if others:
        off = [others[r.id].score for r in records]
        found["accuracy_off"] = accuracy(off, groups).to_dict()
        found["gain"] = change([r.score for r in records], off, groups).to_dict()
    found["invoked"] = share(invoked, groups).to_dict()
    found["invocations"] = {k: sum(i["kind"] == k for r in records for i in r.invocations) for k in KINDS}
    return found


def effect(
    intervention: Intervention | None,
    intact: Mapping[str, Record],
    others: Mapping[str, Record],
    shifts: Mapping[str, Mapping[str, Any]],
    activations: ActivationStore,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Any]:
    """One intervention's table row, over the questions whose intact answer invoked a memory that it can replace.

    Args:
        intervention: None for memory off.
        intact, others: records by id; the intervention may have fewer.
        shifts: replay results by id.
        activations: of the rows.
        kinds: kinds that must have been invoked, if `intervention` is None.

    Returns:
        `n`, and if it is above 0: `accuracy`, `intact`, `change` (in fractions), `flips` (share of answers whose text
        changed), `score_flips`; with replays also `moved`, `kl_first`, `kl_rest` and their medians.
    """
    name = OFF if intervention is None else intervention.name
    kinds = kinds if intervention is None else intervention.kinds
    invoked = [i for i in intact if _invoked(intact[i], kinds)]
    ids = [i for i in invoked if i in others and (intervention is None or possible(activations, intervention, i))]
    found: dict[str, Any] = {"name": name, "kinds": list(kinds), "n": len(ids), "not_possible": len(invoked) - len(ids)}
    if not ids:
        return found
    groups = [activations.group(i) for i in ids]
    before, after = [intact[i].score for i in ids], [others[i].score for i in ids]
    found["accuracy"] = accuracy(after, groups).to_dict()
    found["intact"] = accuracy(before, groups).to_dict()
    found["change"] = change(after, before, groups).to_dict()
    found["flips"] = share([others[i].reply.strip() != intact[i].reply.strip() for i in ids], groups).to_dict()
    found["score_flips"] = share([one != two for one, two in zip(before, after, strict=True)], groups).to_dict()
    if intervention is not None:
        found |= memory_shifts(name, kinds, ids, shifts, activations)
    return found


def memory_shifts(
    name: str,
    kinds: Sequence[str],
    ids: Sequence[str],
    shifts: Mapping[str, Mapping[str, Any]],
    activations: ActivationStore,
) -> dict[str, Any]:
    """How far an intervention moves memories and next tokens, over invocations grouped by image."""
    wanted = [
        (activations.group(i), s)
        for i in ids
        if i in shifts
        for s in shifts[i]["shifts"]
        if s["name"] == name and s["kind"] in kinds
    ]
    found = {}
    for key, part in (("moved", "moved"), ("kl_first", "first"), ("kl_rest", "rest")):
        values = [(group, s[part]) for group, s in wanted if s.get(part) is not None]
        if values:
            numbers = [value for _, value in values]
            found[key] = average(numbers, [group for group, _ in values]).to_dict()
            found[key]["median"] = round(median(numbers), 5)
    return found


def _invoked(record: Record, kinds: Sequence[str]) -> bool:
    return any(one["kind"] in kinds and one["length"] for one in record.invocations)
