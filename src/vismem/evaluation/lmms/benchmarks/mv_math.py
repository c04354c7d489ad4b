"""MV-MATH (Wang et al., arXiv 2502.20808): school mathematics with two to eight pictures in the text.

Answers are the letter of an option, free-form, or one for each part of a multi-step question. The authors let a
language model judge all three. Here rules compare letters and formulas (math-verify), and a separate task uses a judge.
The layout is that of the authors' repository eternal8080/MV-MATH; wording and code are ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from vismem.evaluation.lmms.benchmarks.pictures import picture
from vismem.training.rewards.answers import extract_answer
from vismem.training.rewards.builtin import math, read_choice, read_options

MARK = re.compile(r"<image_(\d+)>")
PART = re.compile(r"\(\s*([1-9])\s*\)\s*[.:]?")
STATED = re.compile(r"\banswers?\b[\s*_]*(?:is|are)?[\s*_]*:", re.IGNORECASE)
WIDE = {ord(wide): ord(plain) for wide, plain in zip("\uff08\uff09\uff1a\uff1b\uff0c\u3002", "():;,.", strict=True)}
METRICS = {"choice": "choice_accuracy", "free-form": "free_form_accuracy"}
ASKED = {
    "choice": "Reason step by step. End with one line: Answer: the letter of the right option.",
    "free-form": "Reason step by step. End with one line: Answer: the result alone.",
    "multi-step": "Reason step by step. End with one line that has the result of each part: Answer: (1) ...; (2) ...",
}


def text(doc: dict[str, Any], _lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question with its image markers, and the answer format."""
    return f"{doc['question'].strip()}\n{ASKED[kind(doc)]}"


def kind(doc: dict[str, Any]) -> str:
    """The answer's type. Raises ValueError for an unknown one."""
    found = str(doc["answer_type"]).strip().lower()
    if found not in ASKED:
        raise ValueError(f"problem {doc['problem_id']}: answer_type must be one of {', '.join(ASKED)}, got {found!r}")
    return found


def messages(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Text and pictures in the question's order; pictures without a marker come first.

    Raises:
        ValueError: if a marker refers to a missing picture.
    """
    names = doc["input_image"]
    pieces = MARK.split(text(doc))  # words, number, words, number, ...
    used = [int(number) for number in pieces[1::2]]
    wrong = [number for number in used if not 1 <= number <= len(names)]
    if wrong:
        raise ValueError(f"problem {doc['problem_id']} names picture {wrong[0]} and has {len(names)}")

    def show(number: int) -> dict[str, Any]:
        return {"type": "image", "url": picture(lmms_eval_specific_kwargs["images"], names[number - 1])}

    parts = [show(number) for number in range(1, len(names) + 1) if number not in used]
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append(show(int(piece)))
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return [{"role": "user", "content": parts}]


def results(doc: dict[str, Any], replies: Sequence[str]) -> dict[str, Any]:
    """Rule-based scores of a reply."""
    return _results(doc, replies[0], same_choice, same_value)


def judged_results(doc: dict[str, Any], replies: Sequence[str]) -> dict[str, Any]:
    """Scores of a reply by a judge, part by part."""
    return _results(doc, replies[0], same_by_judge, same_by_judge)


def _results(
    doc: dict[str, Any], reply: str, same_letter: Callable[..., Any], same: Callable[..., Any]
) -> dict[str, Any]:
    """`accuracy` counts a multi-step question if all its parts are right, as in the authors' total."""
    found, reference = kind(doc), str(doc["answer"]).strip()
    if found != "multi-step":
        right = float((same_letter if found == "choice" else same)(doc["question"], reference, reply))
        return {"accuracy": right, METRICS[found]: right}
    wanted, said = steps(reference), steps(STATED.split(reply.translate(WIDE))[-1])
    hits = [part in said and same(doc["question"], answer, said[part]) for part, answer in wanted.items()]
    whole = float(all(hits))
    return {"accuracy": whole, "question_completeness": whole, "step_accuracy": [sum(hits), len(hits)]}


def steps(answer: str) -> dict[int, str]:
    """The parts of a multi-step answer by number; an answer without numbers is a single part.

    Example:
        >>> steps("(1) $(4,2)$; (2) 7.5.")
        {1: '$(4,2)$', 2: '7.5'}
    """
    pieces = PART.split(answer.translate(WIDE))
    found = {int(n): part.strip(" \n;,.") for n, part in zip(pieces[1::2], pieces[2::2], strict=True)}
    return found or {1: answer.strip()}


def same_choice(question: str, reference: str, reply: str) -> bool:
    """Whether the reply chooses the reference's option."""
    return read_choice(extract_answer(reply), read_options(question)) == reference.upper()[:1]


def same_value(question: str, reference: str, reply: str) -> bool:
    """Whether the reply's answer equals the reference mathematically."""
    (score,) = _equal()(prompts=[question], completions=[reply], answer=[reference])
    return bool(score)


@cache
def _equal() -> Callable[..., Any]:
    return math()


def same_by_judge(question: str, reference: str, reply: str) -> bool:
    """The verdict of lmms-eval's judge, configured by API_TYPE, OPENAI_API_URL, OPENAI_API_KEY and MODEL_VERSION.

    Raises:
        ValueError: if there is no key, or the endpoint does not respond.
    """
    found = _judge().evaluate_binary(MARK.sub("", question), reference, reply)
    return bool(found["result"])


@cache
def _judge() -> Any:
    from lmms_eval.llm_judge import ServerConfig, get_server

    model = os.getenv("MODEL_VERSION", "gpt-4o-2024-11-20")
    return get_server(os.getenv("API_TYPE", "openai"), ServerConfig(model_name=model, temperature=0.0, max_tokens=16))


def step_accuracy(entries: Sequence[Sequence[int]]) -> float:
    """The fraction of right parts over all multi-step questions."""
    return sum(right for right, _ in entries) / max(sum(count for _, count in entries), 1)
