"""Effects of replacing memories: accuracy, answers and next tokens compared with the intact ones, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vismem.audit.activations import ActivationStore
from vismem.audit.names import CONTENT_FREE
from vismem.audit.statistics import average, change, share
from vismem.config import KINDS
from vismem.evaluation.records import Record

Shifts = Mapping[str, Mapping[str, Any]]  # results of `replay`, by row


def overview(records: Sequence[Record], off: Mapping[str, Record], activations: ActivationStore) -> dict[str, Any]:
    """Accuracy with and without memory over all questions, and how often memory was invoked."""
    groups = [activations.group(r.id) for r in records]
    scores, without = [r.score for r in records], [off[r.id].score for r in records]
    return {
        "n": len(records),
        "images": len(set(groups)),
        "accuracy": share(scores, groups),
        "accuracy_off": share(without, groups),
        "gain": change(scores, without, groups),
        "invoked": share([bool(r.invocations) for r in records], groups),
        "invocations": {kind: sum(i["kind"] == kind for r in records for i in r.invocations) for kind in KINDS},
    }


def effect(
    name: str,
    kinds: Sequence[str],
    intact: Mapping[str, Record],
    others: Mapping[str, Record],
    activations: ActivationStore,
    shifts: Shifts | None = None,
    off: Mapping[str, Record] | None = None,
) -> dict[str, Any]:
    """One intervention's table row, over the questions whose intact answer invoked a memory that it replaces.

    Args:
        name: of the intervention, or `OFF`.
        kinds: kinds of memory that it replaces.
        intact, others: records by id; `others` has those with a replacement.
        activations: of the rows.
        shifts: replay results by id.
        off: records without memory, which content-free replacements are compared with.

    Returns:
        `n`, and if it is above 0: `accuracy`, `intact`, `change` (in fractions), `flips` (share of answers whose text
        changed), `score_flips`; with replays also `moved`, `kl_first`, `kl_rest` and their medians; `over_off`.
    """
    invoked = [i for i in intact if any(one["kind"] in kinds and one["length"] for one in intact[i].invocations)]
    ids = [i for i in invoked if i in others]
    found: dict[str, Any] = {"name": name, "kinds": list(kinds), "n": len(ids), "not_possible": len(invoked) - len(ids)}
    if not ids:
        return found
    groups = [activations.group(i) for i in ids]
    before, after = [intact[i].score for i in ids], [others[i].score for i in ids]
    found["accuracy"] = share(after, groups)
    found["intact"] = share(before, groups)
    found["change"] = change(after, before, groups)
    found["flips"] = share([others[i].reply.strip() != intact[i].reply.strip() for i in ids], groups)
    found["score_flips"] = share([one != two for one, two in zip(before, after, strict=True)], groups)
    own = [(i, s) for i in ids if shifts and i in shifts for s in shifts[i]["shifts"]]
    own = [(i, s) for i, s in own if s["name"] == name and s["kind"] in kinds]
    for key, part in (("moved", "moved"), ("kl_first", "first"), ("kl_rest", "rest")):
        known = [(activations.group(i), s[part]) for i, s in own if s.get(part) is not None]
        if known:
            values = [value for _, value in known]
            found[key] = average(values, [group for group, _ in known]) | {"median": round(median(values), 5)}
    if off and name in CONTENT_FREE:
        found["over_off"] = change(after, [off[i].score for i in ids], groups)
    return found
