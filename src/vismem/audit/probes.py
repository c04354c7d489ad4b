"""Linear probes: what can be read from memory vectors, compared with visual tokens, the query and chance.

Every source is treated the same: a row's vectors are concatenated (a mean over slots would lose positions),
standardised, reduced to the same number of principal components, fitted on the training folds only, and read by a
logistic regression. No image is in both a training and a test fold.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from vismem.audit.activations import ActivationStore, pooled, present
from vismem.audit.statistics import average, share
from vismem.audit.targets import Target
from vismem.config import KINDS, Kind

MEMORY, VISUAL, QUERY = "memory", "visual tokens", "query"
FOLDS, REPEATS = 5, 2
MOST_COMPONENTS = 128
PROBE = LogisticRegression(C=0.1, max_iter=100, tol=1e-3)
MAJORITY = DummyClassifier(strategy="most_frequent")
FEWEST_ROWS = 40
FEWEST_OF_CLASS = 4  # rows per class on average; fewer are too few to learn from


def probe_kinds(
    activations: ActivationStore, wanted: Sequence[Target], rows: Sequence[str], seed: int = 0
) -> dict[Kind, dict[str, Any]]:
    """Probes each kind of memory that enough answers invoked, using an answer's first memory of the kind.

    `wanted` has a value for each of `rows`, which are ids. Returns by kind the result of `probe`, or
    `{"rows": n, "skipped": reason}`.
    """
    found: dict[Kind, dict[str, Any]] = {}
    for kind in KINDS:
        places = [at for at, i in enumerate(rows) if activations.entries[i].of_kind(kind)]
        if not places:
            continue
        if len(places) < FEWEST_ROWS:
            found[kind] = {"rows": len(places), "skipped": f"fewer than {FEWEST_ROWS} answers invoked it"}
            continue
        ids = [rows[at] for at in places]
        groups, facts = [activations.group(i) for i in ids], [target.at(places) for target in wanted]
        found[kind] = probe(features(activations, kind, ids), facts, groups, seed, f"probes, {kind}")
    return found


def features(activations: ActivationStore, kind: Kind, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Inputs [rows, values]: memory and query of each row's first invocation of the kind, and its visual tokens.

    Visual tokens are pooled to the smaller of the memory's length and the shortest row's number of tokens.
    """
    entries = [activations.entries[i] for i in ids]
    first = [(entry, entry.of_kind(kind)[0]) for entry in entries]
    length = min(len(entry.memory(index)) for entry, index in first)
    found = {MEMORY: [entry.memory(index)[:length] for entry, index in first]}
    if shown := min([length, *(len(entry.visual) for entry in entries)]):
        found[VISUAL] = [pooled(entry.visual, shown) for entry in entries]
    found[QUERY] = [present(entry.queries[index]) for entry, index in first]
    return {name: np.stack([one.float().flatten().numpy() for one in vectors]) for name, vectors in found.items()}


def probe(
    sources: Mapping[str, NDArray[np.float32]],
    wanted: Sequence[Target],
    groups: Sequence[str],
    seed: int = 0,
    label: str = "probes",
) -> dict[str, Any]:
    """Probes every source for every target.

    Args:
        sources: [rows, values] each.
        wanted: targets with a value, or None, for each row.
        groups: for each row its group; groups are not split between folds.
        seed: of folds and shuffles.
        label: of the progress bar.

    Returns:
        `rows`, `components`, `families` and `skipped` (from a target's name to the reason). A family has `targets`,
        `classes`, `chance` (accuracy of predicting the training folds' most frequent value), each source's accuracy
        and `SOURCE shuffled` (the same with permuted values), and the paired differences `gain` (memory minus chance),
        `selectivity` (memory minus shuffled), `against visual tokens` and `against query`.
    """
    reasons = {target.name: skip_reason(target, groups) for target in wanted}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    kept = [target for target in wanted if target.name not in skipped]
    folds = [folds_of(groups, seed + repeat) for repeat in range(REPEATS)]
    fewest = min(int((fold != number).sum()) for fold in folds for number in range(FOLDS))  # training rows
    components = max(1, min(MOST_COMPONENTS, fewest // 2, *(values.shape[1] for values in sources.values())))
    right: dict[str, dict[str, list[NDArray[Any]]]] = {target.name: defaultdict(list) for target in kept}
    with tqdm(total=len(folds) * FOLDS * len(sources), desc=label, delay=2, mininterval=1) as bar:
        for repeat, fold in enumerate(folds if kept else []):
            permuted = {t.name: permute(t.values, groups, seed + repeat) for t in kept}
            for source, values in sources.items():
                prepared = []
                for number in range(FOLDS):
                    prepared.append(principal_components(values, fold != number, components, seed))
                    bar.update()
                for target in kept:
                    own = right[target.name]
                    own[source].append(correct(prepared, fold, target.values, PROBE))
                    if repeat == 0:  # one control is enough
                        own[f"{source} shuffled"].append(correct(prepared, fold, permuted[target.name], PROBE))
            for target in kept:
                right[target.name]["chance"].append(correct(prepared, fold, target.values, MAJORITY))
    families = dict.fromkeys(target.family for target in kept)
    summed = {family: summary([t for t in kept if t.family == family], right, groups) for family in families}
    return {"rows": len(groups), "components": components, "families": summed, "skipped": skipped}


def skip_reason(target: Target, groups: Sequence[str]) -> str:
    """Why a target cannot be probed for; empty if it can."""
    known = [(value, group) for value, group in zip(target.values, groups, strict=True) if value is not None]
    classes, images = {value for value, _ in known}, {group for _, group in known}
    if len(known) < FEWEST_ROWS:
        return f"known for {len(known)} rows, fewer than {FEWEST_ROWS}"
    if len(images) < 2 * FOLDS:
        return f"only {len(images)} images, fewer than {2 * FOLDS}"
    if len(classes) < 2:
        return "always the same"
    if len(known) < FEWEST_OF_CLASS * len(classes):
        return f"{len(classes)} values in {len(known)} rows, too many to learn"
    return ""


def folds_of(groups: Sequence[str], seed: int) -> NDArray[np.int64]:
    """The fold [rows] of each row; groups are not split."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    of_group = {names[place]: number % FOLDS for number, place in enumerate(order)}
    return np.array([of_group[group] for group in groups])


def principal_components(values: NDArray[Any], train: NDArray[Any], components: int, seed: int) -> NDArray[Any]:
    """All rows in the training rows' principal components, scaled to unit variance."""
    parts = PCA(components, svd_solver="randomized", random_state=seed)
    return make_pipeline(StandardScaler(), parts, StandardScaler()).fit(values[train]).transform(values)


def correct(
    prepared: Sequence[NDArray[Any]], fold: NDArray[Any], values: Sequence[str | None], probe: Any
) -> NDArray[np.float64]:
    """Whether a probe trained on the other folds predicts each row [rows]; NaN where the value is unknown."""
    wanted = np.array(["" if value is None else value for value in values])
    known, found = np.array([value is not None for value in values]), np.full(len(values), np.nan)
    for number, given in enumerate(prepared):
        train, test = known & (fold != number), known & (fold == number)
        if not test.any():
            continue
        if len(set(wanted[train])) < 2:
            found[test] = wanted[test] == wanted[train][0]
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found[test] = clone(probe).fit(given[train], wanted[train]).predict(given[test]) == wanted[test]
    return found


def permute(values: Sequence[str | None], groups: Sequence[str], seed: int) -> list[str | None]:
    """Permutes values: among groups if each has a single value, otherwise among rows."""
    rng = np.random.default_rng(seed)
    own = dict(zip(groups, values, strict=True))
    if all(own[group] == value for group, value in zip(groups, values, strict=True)):
        names = sorted(own)
        dealt = {name: own[names[place]] for name, place in zip(names, rng.permutation(len(names)), strict=True)}
        return [dealt[group] for group in groups]
    return [values[place] for place in rng.permutation(len(values))]


def summary(
    members: Sequence[Target], right: Mapping[str, Mapping[str, list[NDArray[Any]]]], groups: Any
) -> dict[str, Any]:
    """A family's accuracies: averaged over targets and repeats for each row, then over rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows without known values
        rows = {
            name: np.nanmean([line for target in members for line in right[target.name][name]], axis=0)
            for name in right[members[0].name]
        }
    known = ~np.isnan(rows[MEMORY])
    kept = [group for group, is_known in zip(groups, known, strict=True) if is_known]
    found: dict[str, Any] = {
        "targets": [target.name for target in members],
        "classes": max(len(set(target.values) - {None}) for target in members),
        **{name: share(values[known].tolist(), kept) for name, values in rows.items()},
    }
    pairs = {"gain": "chance", "selectivity": f"{MEMORY} shuffled"}
    pairs |= {f"against {other}": other for other in (VISUAL, QUERY) if other in rows}
    for name, other in pairs.items():
        found[name] = average((rows[MEMORY][known] - rows[other][known]).tolist(), kept)
    return found
