"""Verdicts in words, each with its number, by rules whose thresholds stand here and nowhere else.

A rule compares a 95 % interval with a threshold: all of it above is yes, all of it below is no, and an interval that
holds the threshold decides nothing. So no verdict is a matter of luck, and few questions give few verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vismem.audit.names import CONTENT_FREE

YES, NO, OPEN, UNTESTED = "yes", "no", "not decidable", "not tested"


@dataclass(frozen=True)
class Thresholds:
    """Where yes begins and no ends.

    Args:
        flips: share of answers whose text changes: below it an answer does not depend on what was replaced.
        large: share of answers from which on an effect is called large.
        moved: distance from the intact memory, relative to it, below which a memory is the same memory.
        points: accuracy that a memory's content must be worth, beyond vectors without content.
        gaze: share of the attention of later tokens, in the layer that looks most, from which on slots are looked at.
        alike: the same for attention in parts of what slots would get if all positions were looked at alike; enough by
            itself, as few slots among very many positions cannot get much.
        read: accuracy that a probe must gain over chance and over shuffled values.
        fewest: questions below which nothing is decided.
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
    """One question about the memory, answered.

    Args:
        question: in words.
        kinds: whose memory it is about: `"all"`, `"short"` or `"long"`.
        answer: yes, no, not decidable, or not tested.
        text: the answer with its numbers.
        large: whether the effect is large.
    """

    question: str
    kinds: str
    answer: str
    text: str
    large: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.question} {self.answer}{', a large effect' if self.large else ''}: {self.text}"


# What is asked of an intervention: its name, the question, and how the replacement is called.
DEPENDENCES = (
    ("zeros", "Does the answer depend on the memory?", "replacing it by zeros"),
    ("another_image", "Does it depend on the image?", "the memory of another image"),
    ("another_question", "Does it depend on the question?", "the memory of another question"),
    ("other_kind", "Does it depend on the kind?", "the other kind's memory"),
    ("shuffled", "Does it depend on the order of the slots?", "shuffling the slots"),
)


BESIDE = ("chance", "visual tokens", "query")  # what a probe of memory is held against


def verdicts(found: Mapping[str, Any], limits: Thresholds = THRESHOLDS) -> list[Verdict]:
    """All verdicts of an audit's numbers.

    Args:
        found: `effects` (by "all", "short", "long": rows as `effects.effect` makes them), and where they were
            measured `gaze` and `probes`.
        limits: the thresholds.
    """
    given = []
    for kinds, rows in found["effects"].items():
        by_name = {row["name"]: row for row in rows}
        given += [
            depends(question, how, by_name[name], kinds, limits)
            for name, question, how in DEPENDENCES
            if name in by_name
        ]
        content = [by_name[name] for name in CONTENT_FREE if name in by_name]
        if content:
            given.append(more_than_computation(content, kinds, limits))
    for kinds, gaze in (found.get("gaze") or {}).items():
        given.append(looked_at(gaze, kinds, limits))
    for kinds, probes in (found.get("probes") or {}).items():
        given.append(readable(probes, kinds, limits))
    return given


def depends(question: str, how: str, row: Mapping[str, Any], kinds: str, limits: Thresholds) -> Verdict:
    """Whether answers change with a replacement, and whether the memory does."""
    if not row["n"]:
        return Verdict(question, kinds, UNTESTED, untested(row))
    flips, cost, n = row["flips"], row["change"], row["n"]
    numbers = f"{how} changes {percent(flips)} of answers and {costs(cost)}"
    moved = row.get("moved")
    if moved and row["name"] != "zeros":
        numbers += f"; the memory itself moves by {100 * moved['value']:.1f} % of its length"
    answer = decided(flips, limits.flips)
    if answer != YES and moved and moved["high"] < limits.moved:
        answer, numbers = NO, f"the memory is the same. {numbers[0].upper()}{numbers[1:]}"
    return verdict(question, kinds, answer, numbers, n, limits, flips["low"] >= limits.large)


def more_than_computation(rows: Sequence[Mapping[str, Any]], kinds: str, limits: Thresholds) -> Verdict:
    """Whether the content is worth anything that as many vectors without content are not."""
    question = "Is it more than extra computation?"
    tested = [row for row in rows if row["n"]]
    if not tested:
        return Verdict(question, kinds, UNTESTED, untested(rows[0]))
    worth = [mirrored(row["change"]) for row in tested]
    answers = {decided(each, limits.points) for each in worth}
    answer = NO if NO in answers else YES if answers == {YES} else OPEN
    nearest = min(tested, key=lambda row: -row["change"]["value"])
    text = (
        f"with the memory {percent(nearest['intact'])} are right, {points(mirrored(nearest['change']))} more than with "
        f"the best of {', '.join(row['name'] for row in tested)}, which is {nearest['name']}"
    )
    if "over_off" in nearest:
        text += f" and is itself worth {points(nearest['over_off'])} over no memory at all"
    large = all(each["low"] >= limits.large for each in worth)
    return verdict(question, kinds, answer, text, nearest["n"], limits, large)


def verdict(
    question: str, kinds: str, answer: str, text: str, n: int, limits: Thresholds, large: bool = False
) -> Verdict:
    """A verdict on n questions; too few decide nothing."""
    if n < limits.fewest or answer == OPEN:
        return Verdict(question, kinds, OPEN, f"with n = {n}: {text}")
    return Verdict(question, kinds, answer, f"{text}; n = {n}", large and answer == YES)


def looked_at(gaze: Mapping[str, Any], kinds: str, limits: Thresholds) -> Verdict:
    """Whether later tokens look at the slots more than at positions in general."""
    question = "Do later tokens look at it?"
    if not gaze.get("n"):
        return Verdict(question, kinds, UNTESTED, gaze.get("why", "no answer invoked it"))
    ratio, most = gaze["ratio"], gaze["most"]
    text = (
        f"slots get {percent(gaze['share']['slots'])} of the attention of what is written after them, {times(ratio)} "
        f"what they would get if a token looked at all it sees alike; {percent(most)} in layer {gaze['layer']} of "
        f"{gaze['layers']}, which looks most"
    )
    answers = {decided(most, limits.gaze), decided(ratio, limits.alike)}
    answer = YES if YES in answers else NO if answers == {NO} else OPEN
    return verdict(question, kinds, answer, text, gaze["n"], limits)


def readable(probes: Mapping[str, Any], kinds: str, limits: Thresholds) -> Verdict:
    """What a linear probe finds in the vectors."""
    question = "Can facts be read from it?"
    if probes.get("skipped") and not probes.get("families"):
        why = probes["skipped"]
        why = why if isinstance(why, str) else "; ".join(f"{name}: {reason}" for name, reason in list(why.items())[:3])
        return Verdict(question, kinds, UNTESTED, why)
    if not probes.get("families"):
        return Verdict(question, kinds, UNTESTED, "no facts are known of these questions; name columns with --probe")
    good, open_ = [], []
    for name, family in probes["families"].items():
        lower = min(family["gain"]["low"], family["selectivity"]["low"])
        upper = min(family["gain"]["high"], family["selectivity"]["high"])
        if lower > limits.read:
            good.append((family["gain"]["value"], name, family))
        elif upper > limits.read:
            open_.append(name)
    good.sort(key=lambda each: -each[0])
    parts = [
        f"{name} {percent(family['memory'])} (chance {100 * family['chance']['value']:.0f}"
        + "".join(
            f", {other} {100 * family[other]['value']:.0f}" for other in ("visual tokens", "query") if other in family
        )
        + ")"
        for _, name, family in good
    ]
    names, n = ", ".join(probes["families"]), probes["rows"]
    if good:
        text = "; ".join(parts) + (f"; not decidable: {', '.join(open_)}" if open_ else "")
        return verdict(question, kinds, YES, text, n, limits)
    if open_:
        return verdict(question, kinds, OPEN, ", ".join(open_), n, limits)
    return verdict(question, kinds, NO, f"none of {names} is read better than chance", n, limits)


def decided(estimate: Mapping[str, float], limit: float) -> str:
    """Yes above the limit, no below it, open where the interval holds it."""
    if estimate["low"] > limit:
        return YES
    return NO if estimate["high"] < limit else OPEN


def untested(row: Mapping[str, Any]) -> str:
    """Why an intervention has no number."""
    if row.get("not_possible"):
        return f"in none of {row['not_possible']} answers with memory is there anything to put in its place"
    return "no answer invoked it"


def mirrored(estimate: Mapping[str, float]) -> dict[str, float]:
    """The estimate of the negative."""
    return {**estimate, "value": -estimate["value"], "low": -estimate["high"], "high": -estimate["low"]}


def percent(estimate: Mapping[str, float]) -> str:
    """A share with its interval, in per cent."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return (
        f"{value:.0f} % [{low:.0f}, {high:.0f}]"
        if value >= 10 or value == 0
        else f"{value:.1f} % [{low:.1f}, {high:.1f}]"
    )


def points(estimate: Mapping[str, float]) -> str:
    """A difference of accuracies with its interval, in points."""
    value, low, high = (round(100 * estimate[name]) + 0 for name in ("value", "low", "high"))
    return f"{value} points [{low}, {high}]"


def costs(change: Mapping[str, float]) -> str:
    """A change of accuracy in words."""
    if change["value"] > 0:
        return f"gains {points(change)}"
    return f"costs {points(mirrored(change))}"


def times(estimate: Mapping[str, float]) -> str:
    """A ratio with its interval."""
    return f"{estimate['value']:.1f} times [{estimate['low']:.1f}, {estimate['high']:.1f}]"
