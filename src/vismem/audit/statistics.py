"""Numbers with their 95 % intervals, as the audit states them: means, shares, and paired changes.

Bootstrap over images (questions about one image are not independent). A bootstrap of values that are all alike has
no width, however few they are; shares and changes therefore get at least the width of a Wilson interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vismem.evaluation.intervals import bootstrap_mean, wilson


@dataclass(frozen=True)
class Estimate:
    """A number, the ends of its 95 % interval, and how many values it is the mean of."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with as many digits as mean something."""
        return {name: round(v, 5) if isinstance(v, float) else v for name, v in asdict(self).items()}


def average(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """The mean of values; groups are drawn together. Raises ValueError if there is no value."""
    return Estimate(*bootstrap_mean(values, groups), len(values))


def share(values: Sequence[bool | float], groups: Sequence[str]) -> Estimate:
    """A mean of values from 0 to 1: the wider of bootstrap and Wilson interval, the latter for as many groups."""
    found = average([float(value) for value in values], groups)
    low, high = wilson(found.value, len(set(groups)))
    return Estimate(found.value, min(low, found.low), max(high, found.high), found.n)


def accuracy(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """A mean of scores: a share where all lie between 0 and 1."""
    return (share if all(0 <= value <= 1 for value in values) else average)(values, groups)


def change(values: Sequence[float], others: Sequence[float], groups: Sequence[str]) -> Estimate:
    """Mean of `values` less mean of `others`, paired.

    Where no value differs the interval is that of a share of 0 questions that differ, each by the scores' range.
    """
    differences = [one - two for one, two in zip(values, others, strict=True)]
    found = average(differences, groups)
    if any(differences):
        return found
    bound = wilson(0.0, len(set(groups)))[1] * max(1.0, *map(abs, values))
    return Estimate(0.0, -bound, bound, found.n)
