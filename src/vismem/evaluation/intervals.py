"""Means with 95 % bootstrap intervals: over questions, over seeds and questions, paired, and of averages.

Scores of one condition are a matrix [seeds, questions]; a condition without seeds has one row. All draws are the same
for the same shapes, so that a table made again is the same table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
HELD = 2**22  # numbers of questions drawn at a time
LEVEL = (2.5, 97.5)  # percentiles
Z = 1.959964  # of a normal distribution, for the same 95 %


def matrix(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores as [seeds, questions]; a plain list of scores is one seed's.

    Raises:
        ValueError: if there is no score, or one is not finite.
    """
    found = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if found.ndim != 2 or found.size == 0:
        raise ValueError(f"scores must be [questions] or [seeds, questions] with at least one score, got {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError("a score is not a finite number")
    return found


def draws(scores: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Bootstrap draws [DRAWS] of the mean: questions drawn anew, and seeds where there are several.

    Questions are drawn for all seeds alike, as all seeds answer the same ones.
    """
    found, rng = matrix(scores), np.random.default_rng(seed)
    seeds, questions = found.shape
    parts = []
    most = max(HELD // questions, 1)
    for start in range(0, DRAWS, most):
        size = min(most, DRAWS - start)
        drawn = rng.multinomial(questions, np.full(questions, 1 / questions), size) / questions  # [size, questions]
        picked = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds  # [size, seeds]
        parts.append((picked * (drawn @ found.T)).sum(1))
    return np.concatenate(parts)


def interval(drawn: ArrayLike) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = np.percentile(np.asarray(drawn, dtype=float), LEVEL)
    return float(low), float(high)


def bootstrap_mean(scores: ArrayLike, groups: Sequence[object] | None = None) -> tuple[float, float, float]:
    """The mean of scores and its 95 % interval.

    Args:
        scores: [questions] or [seeds, questions].
        groups: for each question what it shares with others (its image): groups are then drawn, not questions. The
            mean is over questions all the same.

    Returns:
        Mean, low, high.

    Example:
        >>> bootstrap_mean([1.0] * 8)
        (1.0, 1.0, 1.0)
    """
    found = matrix(scores)
    if groups is None:
        return float(found.mean()), *interval(draws(found))
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    member = np.array([names[name] for name in groups])
    if len(member) != found.shape[1]:
        raise ValueError(f"{len(member)} groups for {found.shape[1]} questions")
    sums = np.stack([np.bincount(member, row, len(names)) for row in found]).mean(0)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
    return float(found.mean()), *interval(drawn @ sums / (drawn @ np.bincount(member, minlength=len(names))))


def bootstrap_difference(scores: ArrayLike, others: ArrayLike) -> tuple[float, float, float]:
    """Mean of `scores` less mean of `others` on the same questions (paired), and its 95 % interval.

    Where the two have different numbers of seeds, each is averaged over its own.
    """
    one, two = matrix(scores), matrix(others)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"a paired difference needs the same questions, got {one.shape[1]} and {two.shape[1]}")
    if one.shape[0] != two.shape[0]:
        one, two = one.mean(0, keepdims=True), two.mean(0, keepdims=True)
    return bootstrap_mean(one - two)


def bootstrap_average(parts: Sequence[ArrayLike]) -> tuple[float, float, float]:
    """The unweighted average of several benchmarks' means, and its 95 % interval; benchmarks are drawn apart."""
    drawn = np.mean([draws(part, seed=index) for index, part in enumerate(parts)], axis=0)
    return float(np.mean([matrix(part).mean() for part in parts])), *interval(drawn)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of n; a bootstrap of scores that are all alike has no width at all."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)
