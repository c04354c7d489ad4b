"""Verdicts in words, each with its number; all thresholds are here.

A rule compares a 95 % interval with a threshold: yes if all of it lies above, no if all of it lies below, and not
decidable otherwise. So no verdict depends on chance, and few questions give few verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vismem.audit.names import CONTENT_FREE

YES, NO, OPEN, UNTESTED = "yes", "no", "not decidable", "not tested"


@dataclass(frozen=True)
class Thresholds:
    """The thresholds between yes and no.

    Args:
        flips: share of answers whose text changes; below it answers do not depend on what was replaced.
        large: share of answers above which an effect is called large.
        moved: distance from the intact memory, relative to its norm, below which a memory counts as unchanged.
        points: accuracy that memory must add over vectors without content.
        gaze: share of later tokens' attention on the slots, in the layer with the largest share.
        alike: ratio of that attention to uniform attention; sufficient on its own, because few slots among very many
            positions cannot get a large share.
        read: accuracy that a probe must gain over chance and over shuffled values.
        fewest: minimum number of questions for a verdict.
    """

    flips: float = 0.05
    large: float = 0.3
    moved: float = 0.01
    points: float = 0.05
    gaze: float = 0.05
    alike: float = 1.0
    read: float = 0.05
    fewest: int = 10


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Verdict:
    """The answer to one question about the memory.

    Args:
        question: in words.
        kinds: `"all"`, `"short"` or `"long"`.
        answer: yes, no, not decidable, or not tested.
        text: the answer with its numbers.
        large: whether the effect is large.
    """

    question: str
    kinds: str
    answer: str
    text: str
    large: bool = False


# Of each intervention: its name, the question it answers, and a phrase for the replacement.
DEPENDENCES = (
    ("zeros", "Does the answer depend on the memory?", "replacing it by zeros"),
    ("another_image", "Does it depend on the image?", "the memory of another image"),
    ("another_question", "Does it depend on the question?", "the memory of another question"),
    ("other_kind", "Does it depend on the kind?", "the other kind's memory"),
    ("shuffled", "Does it depend on the order of the slots?", "shuffling the slots"),
)


def verdicts(found: Mapping[str, Any]) -> list[Verdict]:
    """All verdicts on an audit's results.

    Args:
        found: `effects` (by "all", "short", "long": rows of `effects.effect`), and if measured `gaze` and `probes`.
    """
    given = []
    for kinds, rows in found["effects"].items():
        by_name = {row["name"]: row for row in rows}
        given += [
            depends(question, how, by_name[name], kinds) for name, question, how in DEPENDENCES if name in by_name
        ]
        content = [by_name[name] for name in CONTENT_FREE if name in by_name]
        if content:
            given.append(more_than_computation(content, kinds))
    given += [attended_to(attention, kinds) for kinds, attention in found.get("gaze", {}).items()]
    return given + [readable(probes, kinds) for kinds, probes in found.get("probes", {}).items()]


def depends(question: str, how: str, row: Mapping[str, Any], kinds: str) -> Verdict:
    """Whether a replacement changes answers, and whether it changes the memory."""
    if not row["n"]:
        return Verdict(question, kinds, UNTESTED, untested(row))
    flips, cost, n = row["flips"], row["change"], row["n"]
    numbers = f"{how} changes {percent(flips)} of answers and {costs(cost)}"
    moved = row.get("moved")
    if moved and row["name"] != "zeros":
        numbers += f"; the memory itself moves by {100 * moved['value']:.1f} % of its length"
    answer = decided(flips, THRESHOLDS.flips)
    if answer != YES and moved and moved["high"] < THRESHOLDS.moved:
        answer, numbers = NO, f"the memory is the same. {numbers[0].upper()}{numbers[1:]}"
    return verdict(question, kinds, answer, numbers, n, large=flips["low"] >= THRESHOLDS.large)


def more_than_computation(rows: Sequence[Mapping[str, Any]], kinds: str) -> Verdict:
    """Whether the content adds accuracy over the same number of vectors without content."""
    question = "Is it more than extra computation?"
    tested = [row for row in rows if row["n"]]
    if not tested:
        return Verdict(question, kinds, UNTESTED, untested(rows[0]))
    worth = [mirrored(row["change"]) for row in tested]
    answers = {decided(each, THRESHOLDS.points) for each in worth}
    answer = NO if NO in answers else YES if answers == {YES} else OPEN
    nearest = max(tested, key=lambda row: row["change"]["value"])
    text = (
        f"with the memory {percent(nearest['intact'])} are right, {points(mirrored(nearest['change']))} more than with "
        f"the best of {', '.join(row['name'] for row in tested)}, which is {nearest['name']}"
    )
    if "over_off" in nearest:
        text += f" and itself adds {points(nearest['over_off'])} over no memory at all"
    large = all(each["low"] >= THRESHOLDS.large for each in worth)
    return verdict(question, kinds, answer, text, nearest["n"], large=large)


def verdict(question: str, kinds: str, answer: str, text: str, n: int, *, large: bool = False) -> Verdict:
    """A verdict on n questions; not decidable if they are too few."""
    if n < THRESHOLDS.fewest or answer == OPEN:
        return Verdict(question, kinds, OPEN, f"with n = {n}: {text}")
    return Verdict(question, kinds, answer, f"{text}; n = {n}", large and answer == YES)


def attended_to(attention: Mapping[str, Any], kinds: str) -> Verdict:
    """Whether later tokens attend to the slots more than to positions in general."""
    question = "Do later tokens look at it?"
    if not attention.get("n"):
        return Verdict(question, kinds, UNTESTED, attention.get("why", "no answer invoked it"))
    ratio, most = attention["ratio"], attention["most"]
    text = (
        f"slots get {percent(attention['share']['slots'])} of the attention of what is written after them, "
        f"{ratio['value']:.1f} times [{ratio['low']:.1f}, {ratio['high']:.1f}] uniform attention; "
        f"{percent(most)} in layer {attention['layer']} of {attention['layers']}, "
        "where they get most"
    )
    answers = {decided(most, THRESHOLDS.gaze), decided(ratio, THRESHOLDS.alike)}
    answer = YES if YES in answers else NO if answers == {NO} else OPEN
    return verdict(question, kinds, answer, text, attention["n"])


def readable(probes: Mapping[str, Any], kinds: str) -> Verdict:
    """Which facts a linear probe can read from the vectors."""
    question = "Can facts be read from it?"
    families = probes.get("families")
    if not families:
        reason = probes.get("skipped")
        if isinstance(reason, dict):
            reason = "; ".join(f"{name}: {why}" for name, why in list(reason.items())[:3])
        reason = reason or "no facts are known of these questions; name columns with --probe"
        return Verdict(question, kinds, UNTESTED, reason)
    read, unclear = [], []
    for name, family in families.items():
        gain, selectivity = family["gain"], family["selectivity"]
        if min(gain["low"], selectivity["low"]) > THRESHOLDS.read:
            read.append(name)
        elif min(gain["high"], selectivity["high"]) > THRESHOLDS.read:
            unclear.append(name)
    if not read and not unclear:
        text = f"none of {', '.join(families)} is read better than chance"
        return verdict(question, kinds, NO, text, probes["rows"])
    if not read:
        return verdict(question, kinds, OPEN, ", ".join(unclear), probes["rows"])
    parts = []
    for name in sorted(read, key=lambda name: -families[name]["gain"]["value"]):
        others = [other for other in ("chance", "visual tokens", "query") if other in families[name]]
        told = [f"{other} {100 * families[name][other]['value']:.0f}" for other in others]
        parts.append(f"{name} {percent(families[name]['memory'])} ({', '.join(told)})")
    text = "; ".join(parts) + (f"; not decidable: {', '.join(unclear)}" if unclear else "")
    return verdict(question, kinds, YES, text, probes["rows"])


def decided(estimate: Mapping[str, float], limit: float) -> str:
    """Yes if the interval lies above the limit, no if below, open otherwise."""
    if estimate["low"] > limit:
        return YES
    return NO if estimate["high"] < limit else OPEN


def untested(row: Mapping[str, Any]) -> str:
    """Why an intervention has no results."""
    if row.get("not_possible"):
        return f"none of {row['not_possible']} answers with memory has a replacement for it"
    return "no answer invoked it"


def mirrored(estimate: Mapping[str, float]) -> dict[str, float]:
    """The negated estimate."""
    return {**estimate, "value": -estimate["value"], "low": -estimate["high"], "high": -estimate["low"]}


def percent(estimate: Mapping[str, float]) -> str:
    """A share with its interval, in per cent."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    digits = 0 if value >= 10 or value == 0 else 1
    return f"{value:.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}]"


def points(estimate: Mapping[str, float]) -> str:
    """A difference of accuracies with its interval, in percentage points."""
    value, low, high = (round(100 * estimate[name]) + 0 for name in ("value", "low", "high"))
    return f"{value} points [{low}, {high}]"


def costs(change: Mapping[str, float]) -> str:
    """A change of accuracy as text."""
    if change["value"] > 0:
        return f"gains {points(change)}"
    return f"costs {points(mirrored(change))}"
