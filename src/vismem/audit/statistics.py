"""Means, shares and paired changes with 95 % intervals, as plain values for JSON.

The bootstrap samples images, since questions about one image are not independent. Identical values give a bootstrap
interval of width 0 however few they are, so shares and changes get at least the width of a Wilson interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vismem.evaluation.intervals import bootstrap_mean, bootstrap_share, wilson


def average(values: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """The mean of values, bootstrapped over groups: `value`, `low`, `high` and `n`."""
    return _rounded(*bootstrap_mean(values, groups), len(values))


def share(values: Sequence[bool | float], groups: Sequence[str]) -> dict[str, Any]:
    """The same for a share; scores outside 0 to 1 get a plain `average`."""
    return _rounded(*bootstrap_share(values, groups), len(values))


def change(values: Sequence[float], others: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """Mean of `values` minus mean of `others`, paired.

    If no value differs, the interval is that of a share of 0 differing questions, scaled to the scores' range.
    """
    differences = [one - two for one, two in zip(values, others, strict=True)]
    if any(differences):
        return average(differences, groups)
    bound = wilson(0.0, len(set(groups)))[1] * max(1.0, *map(abs, values))
    return _rounded(0.0, -bound, bound, len(values))


def _rounded(value: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {"value": round(value, 5), "low": round(low, 5), "high": round(high, 5), "n": n}
