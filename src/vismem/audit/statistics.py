"""Means, shares and paired changes with 95 % intervals.

The bootstrap samples images, since questions about one image are not independent. Identical values give a bootstrap
interval of width 0 however few they are, so shares and changes get at least the width of a Wilson interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vismem.evaluation.intervals import bootstrap_mean, wilson


@dataclass(frozen=True)
class Estimate:
    """A mean of n values and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, rounded to five decimals."""
        return {name: round(v, 5) if isinstance(v, float) else v for name, v in asdict(self).items()}


def average(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """The mean of values, bootstrapped over groups. Raises ValueError if there is no value."""
    return Estimate(*bootstrap_mean(values, groups), len(values))


def share(values: Sequence[bool | float], groups: Sequence[str]) -> Estimate:
    """A mean of values from 0 to 1: the wider of the bootstrap and the Wilson interval, with n the number of groups."""
    found = average([float(value) for value in values], groups)
    low, high = wilson(found.value, len(set(groups)))
    return Estimate(found.value, min(low, found.low), max(high, found.high), found.n)


def accuracy(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """A mean of scores, as a share if all lie between 0 and 1."""
    return (share if all(0 <= value <= 1 for value in values) else average)(values, groups)


def change(values: Sequence[float], others: Sequence[float], groups: Sequence[str]) -> Estimate:
    """Mean of `values` minus mean of `others`, paired.

    If no value differs, the interval is that of a share of 0 differing questions, scaled to the scores' range.
    """
    differences = [one - two for one, two in zip(values, others, strict=True)]
    found = average(differences, groups)
    if any(differences):
        return found
    bound = wilson(0.0, len(set(groups)))[1] * max(1.0, *map(abs, values))
    return Estimate(0.0, -bound, bound, found.n)
