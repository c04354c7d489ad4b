"""Similarity of memories: cosines within and between images, questions and kinds, and two-dimensional maps.

Cosines are given raw and centred. Raw ones show what all memories have in common (vectors of one model point in similar
directions whatever they encode); centred ones, with the mean memory subtracted, show what distinguishes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from vismem.audit.activations import ActivationStore
from vismem.audit.targets import Target
from vismem.config import KINDS, Kind
from vismem.evaluation.intervals import interval

PAIRS = ("same image, other question", "other image, same question", "other image, other question")
BOOTSTRAP_SAMPLES = 500
BINS = np.linspace(-1, 1, 81)
FEWEST = 3  # memories of a kind
MOST_MAPPED = 12  # values that a map can colour

Projection = Literal["pca", "tsne"]


def structure(
    activations: ActivationStore, ids: Sequence[str], wanted: Sequence[Target], how: Projection = "pca", seed: int = 0
) -> dict[str, Any]:
    """Similarities and maps of the rows' memories, using an answer's first memory of each kind.

    Args:
        activations: the intact answers.
        ids: rows.
        wanted: facts of these rows; a map is coloured by the one that separates its points best.
        how: `"pca"`, or `"tsne"` with a fixed seed.
        seed: of t-SNE and the intervals.

    Returns:
        `kinds`: by kind `n` and `pairs` (by name: `n`, and `raw` and `centred`, each with `mean`, `low`, `high`,
        percentiles `5` to `95` and counts in `BINS`); `between kinds`: cosines of mean vectors within a row and
        between rows; `maps`: by kind, and `"kinds"`, the points, their colours, and with PCA the explained variance.
    """
    found: dict[str, Any] = {"kinds": {}, "maps": {}, "bins": [round(float(edge), 4) for edge in BINS]}
    means: dict[Kind, dict[str, NDArray[Any]]] = {}
    for kind in KINDS:
        places = [at for at, i in enumerate(ids) if activations.entries[i].of_kind(kind)]
        if len(places) < FEWEST:
            continue
        own = [ids[at] for at in places]
        entries = [activations.entries[i] for i in own]
        memories = [entry.memory(entry.of_kind(kind)[0]) for entry in entries]
        means[kind] = {i: memory.float().mean(0).numpy() for i, memory in zip(own, memories, strict=True)}
        flat = np.stack([memory.float().flatten().numpy() for memory in memories])
        images, asked = [activations.group(i) for i in own], [activations.question[i] for i in own]
        found["kinds"][kind] = {"n": len(own), "pairs": similarities(flat, images, asked, seed)}
        facts = [target.at(places) for target in wanted]
        found["maps"][kind] = project(flat, how, seed) | colours(flat, facts, images, seed)
    if len(means) == 2:
        found["between kinds"] = between_kinds(means)
        rows = [(kind, vector) for kind in KINDS for vector in means[kind].values()]
        found["maps"]["kinds"] = project(np.stack([vector for _, vector in rows]), how, seed)
        found["maps"]["kinds"] |= {"colour": "kind", "values": [kind for kind, _ in rows]}
    return found


def similarities(flat: NDArray[Any], images: Sequence[str], asked: Sequence[str], seed: int) -> dict[str, Any]:
    """Cosines of all pairs of rows [n, values], by `PAIRS`; categories without pairs are left out."""
    image, question = np.array(images), np.array(asked)
    same_image, same_question = image[:, None] == image[None], question[:, None] == question[None]
    upper = np.triu(np.ones((len(flat), len(flat)), dtype=bool), 1)
    masks = (same_image & ~same_question, ~same_image & same_question, ~same_image & ~same_question)
    cosines = {"raw": cosine(flat), "centred": cosine(flat - flat.mean(0))}
    found = {}
    for name, mask in zip(PAIRS, masks, strict=True):
        if (mask & upper).any():
            spread = {how: spread_of(values, mask & upper, images, seed) for how, values in cosines.items()}
            found[name] = {"n": int((mask & upper).sum()), **spread}
    return found


def cosine(vectors: NDArray[Any]) -> NDArray[Any]:
    """Cosines [n, n] of all pairs; 0 for zero vectors."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-12)
    return np.clip(unit @ unit.T, -1, 1)


def spread_of(values: NDArray[Any], mask: NDArray[Any], groups: Sequence[str], seed: int) -> dict[str, Any]:
    """Mean of the masked pairs with its interval (a bootstrap over images), percentiles and counts."""
    names = {name: at for at, name in enumerate(dict.fromkeys(groups))}
    member = np.array([names[name] for name in groups])
    rng = np.random.default_rng(seed)
    sampled = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), BOOTSTRAP_SAMPLES)
    weights = sampled[:, member].astype(float)  # [samples, n]
    mass = np.einsum("dn,nm,dm->d", weights, mask.astype(float), weights, optimize=True)
    total = np.einsum("dn,nm,dm->d", weights, np.where(mask, values, 0.0), weights, optimize=True)
    low, high = interval(total[mass > 0] / mass[mass > 0])
    kept = values[mask]
    return {
        "mean": round(float(kept.mean()), 5),
        "low": round(low, 5),
        "high": round(high, 5),
        **{str(p): round(float(np.percentile(kept, p)), 5) for p in (5, 25, 50, 75, 95)},
        "counts": np.histogram(kept, BINS)[0].tolist(),
    }


def between_kinds(means: dict[Kind, dict[str, NDArray[Any]]]) -> dict[str, Any]:
    """Cosines of short-term and long-term memories' mean vectors, within an answer and between answers."""
    both = [i for i in means["short"] if i in means["long"]]
    if len(both) < FEWEST:
        return {"n": len(both)}
    stacked = np.concatenate([np.stack([means[kind][i] for i in both]) for kind in KINDS])
    values = cosine(stacked)[: len(both), len(both) :]
    own = np.eye(len(both), dtype=bool)
    return {
        "n": len(both),
        "same answer": round(float(values[own].mean()), 5),
        "other answer": round(float(values[~own].mean()), 5),
    }


def project(flat: NDArray[Any], how: Projection, seed: int) -> dict[str, Any]:
    """The points [n, 2] of a map."""
    if how == "tsne":
        close = min(30, (len(flat) - 1) / 3)
        points = TSNE(perplexity=close, init="pca", random_state=seed).fit_transform(flat)
        return {"how": how, "points": points.round(3).tolist()}
    parts = PCA(2, random_state=seed).fit(flat)
    shown = [round(float(part), 4) for part in parts.explained_variance_ratio_]
    return {"how": how, "points": parts.transform(flat).round(3).tolist(), "shown": shown}


def colours(flat: NDArray[Any], facts: Sequence[Target], images: Sequence[str], seed: int) -> dict[str, Any]:
    """A map's colours: the images if some recur, else the fact that separates the points best."""
    counts = {image: list(images).count(image) for image in dict.fromkeys(images)}
    recurring = sorted((name for name, count in counts.items() if count > 1), key=lambda name: -counts[name])
    if recurring:
        shown = {name: f"image {number}" for number, name in enumerate(recurring[:MOST_MAPPED], 1)}
        return {"colour": "image", "values": [shown.get(image) for image in images]}
    points = PCA(2, random_state=seed).fit_transform(flat)
    rated = [(share, fact) for fact in facts if (share := separation(points, fact.values)) is not None]
    if not rated:
        return {"colour": None, "values": [None] * len(flat)}
    share, fact = max(rated, key=lambda each: each[0])
    return {"colour": fact.name, "values": fact.values, "apart": round(share, 4)}


def separation(points: NDArray[Any], values: Sequence[str | None]) -> float | None:
    """The share of variance between values; None if values are missing, all the same or too many."""
    known = np.array([value is not None for value in values])
    names = {value for value in values if value is not None}
    if not 2 <= len(names) <= MOST_MAPPED or known.sum() < len(values):
        return None
    kinds, middle = np.array([str(value) for value in values]), points.mean(0)
    within = sum(((points[kinds == name] - points[kinds == name].mean(0)) ** 2).sum() for name in names)
    whole = ((points - middle) ** 2).sum()
    return float(1 - within / whole) if whole > 0 else None
