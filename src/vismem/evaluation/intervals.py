"""Means with 95 % bootstrap intervals: over questions, over seeds and questions, paired, and of averages.

Scores of one condition are a matrix [seeds, questions]; a condition without seeds has one row. The bootstrap is seeded,
so equal scores give equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOOTSTRAP_SAMPLES = 2000
CHUNK = 2**22  # sampled question indices held in memory at a time
LEVEL = (2.5, 97.5)  # percentiles
Z = 1.959964  # of the normal distribution, for 95 %


def matrix(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores as [seeds, questions]; a flat list is one seed.

    Raises:
        ValueError: if there is no score, or one is not finite.
    """
    found = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if found.ndim != 2 or found.size == 0:
        raise ValueError(f"scores must be [questions] or [seeds, questions] with at least one score, got {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError("a score is not a finite number")
    return found


def bootstrap_means(scores: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Bootstrap samples of the mean [BOOTSTRAP_SAMPLES]: resamples questions, and seeds if there are several.

    All seeds share the resampled questions, since all answer the same ones.
    """
    found, rng = matrix(scores), np.random.default_rng(seed)
    seeds, questions = found.shape
    parts = []
    most = max(CHUNK // questions, 1)
    for start in range(0, BOOTSTRAP_SAMPLES, most):
        size = min(most, BOOTSTRAP_SAMPLES - start)
        by_question = rng.multinomial(questions, np.full(questions, 1 / questions), size) / questions
        by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds
        parts.append((by_seed * (by_question @ found.T)).sum(1))  # weights [size, questions] and [size, seeds]
    return np.concatenate(parts)


def interval(samples: ArrayLike) -> tuple[float, float]:
    """The middle 95 % of samples."""
    low, high = np.percentile(np.asarray(samples, dtype=float), LEVEL)
    return float(low), float(high)


def bootstrap_mean(scores: ArrayLike, groups: Sequence[object] | None = None) -> tuple[float, float, float]:
    """The mean of scores and its 95 % interval.

    Args:
        scores: [questions] or [seeds, questions].
        groups: for each question its group, such as its image; resamples groups instead of questions. The mean is
            over questions either way.

    Returns:
        Mean, low, high.

    Example:
        >>> bootstrap_mean([1.0] * 8)
        (1.0, 1.0, 1.0)
    """
    found = matrix(scores)
    if groups is None:
        return float(found.mean()), *interval(bootstrap_means(found))
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    member = np.array([names[name] for name in groups])
    if len(member) != found.shape[1]:
        raise ValueError(f"{len(member)} groups for {found.shape[1]} questions")
    sums = np.stack([np.bincount(member, row, len(names)) for row in found]).mean(0)
    rng = np.random.default_rng(0)
    sampled = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), BOOTSTRAP_SAMPLES)
    return float(found.mean()), *interval(sampled @ sums / (sampled @ np.bincount(member, minlength=len(names))))


def bootstrap_share(scores: ArrayLike, groups: Sequence[object] | None = None) -> tuple[float, float, float]:
    """As `bootstrap_mean`; if all scores lie between 0 and 1, the interval is at least as wide as Wilson's.

    The Wilson interval is that of as many questions, or groups, as there are.
    """
    found = matrix(scores)
    value, low, high = bootstrap_mean(found, groups)
    if found.min() < 0 or found.max() > 1:
        return value, low, high
    least, most = wilson(value, found.shape[1] if groups is None else len(set(groups)))
    return value, min(low, least), max(high, most)


def bootstrap_difference(scores: ArrayLike, others: ArrayLike) -> tuple[float, float, float]:
    """Mean of `scores` minus mean of `others` on the same questions (paired), and its 95 % interval.

    If their numbers of seeds differ, each is averaged over its own.
    """
    one, two = matrix(scores), matrix(others)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"a paired difference needs the same questions, got {one.shape[1]} and {two.shape[1]}")
    if one.shape[0] != two.shape[0]:
        one, two = one.mean(0, keepdims=True), two.mean(0, keepdims=True)
    return bootstrap_mean(one - two)


def bootstrap_average(parts: Sequence[ArrayLike]) -> tuple[float, float, float]:
    """The unweighted average of several benchmarks' means and its 95 % interval; each is resampled alone."""
    samples = np.mean([bootstrap_means(part, seed=index) for index, part in enumerate(parts)], axis=0)
    return float(np.mean([matrix(part).mean() for part in parts])), *interval(samples)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of n; unlike the bootstrap's, its width is never 0."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)
