"""MMVU, the benchmark of leading questions (Liu et al., arXiv 2406.10638): pairs of questions about one picture.

The positive question asks what is there; the negative one is misleading. Each has four options. A model that passes the
first and fails the second understood the picture and still answered wrongly. The layout is that of the authors'
repository BAAI-DCAI/Multimodal-Robustness-Benchmark, first release, 300 pairs; wording and code are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from vismem.evaluation.lmms.benchmarks.mv_math import same_choice
from vismem.evaluation.lmms.benchmarks.pictures import message, picture

KINDS = {"POS": "positive", "NEG": "negative"}


def rows(data: Dataset) -> Dataset:
    """Adds columns to group by: `category`, the picture's folders, and `kind`, positive or negative.

    Raises:
        ValueError: if a row is neither positive nor negative.
    """
    unknown = sorted({str(one) for one in data["question_type"]} - KINDS.keys())
    if unknown:
        raise ValueError(f"question_type must be POS or NEG, got {unknown[0]!r}")
    data = data.add_column("category", ["/".join(str(one).split("/")[:-1]) for one in data["id"]])
    return data.add_column("kind", [KINDS[one] for one in data["question_type"]])


def text(doc: dict[str, Any], _lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question with its options."""
    return f"{doc['question']}\nAnswer with the letter of one option only."


def messages(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The picture and the question."""
    return message([picture(lmms_eval_specific_kwargs["images"], doc["image"])], text(doc))


def results(doc: dict[str, Any], replies: Sequence[str]) -> dict[str, Any]:
    """Whether the answer is right: overall, for its kind, and for its pair."""
    right = float(same_choice(doc["question"], str(doc["ground_truth"]).strip(), replies[0]))
    of_pair = {"pair": str(doc["id"]), "kind": doc["kind"], "right": right}
    return {"accuracy": right, doc["kind"]: right, "robust_accuracy": of_pair, "misleading_rate": of_pair}


def pairs(entries: Sequence[dict[str, Any]]) -> list[tuple[bool, bool]]:
    """For each complete pair, whether its positive and its negative question were answered correctly.

    The rows of a pair share an id; if several pairs share one, the n-th positive row belongs to the n-th negative one.
    """
    found: dict[str, dict[str, list[bool]]] = {}
    for entry in entries:
        kinds = found.setdefault(entry["pair"], {"positive": [], "negative": []})
        kinds[entry["kind"]].append(bool(entry["right"]))
    return [both for kinds in found.values() for both in zip(kinds["positive"], kinds["negative"], strict=False)]


def robust_accuracy(entries: Sequence[dict[str, Any]]) -> float:
    """The fraction of pairs with both questions right (the authors' RA)."""
    both = pairs(entries)
    return sum(positive and negative for positive, negative in both) / len(both) if both else 0.0


def misleading_rate(entries: Sequence[dict[str, Any]]) -> float:
    """The fraction of wrong negative questions among pairs whose positive one is right (the authors' MR)."""
    seen = [negative for positive, negative in pairs(entries) if positive]
    return sum(not negative for negative in seen) / len(seen) if seen else 0.0
