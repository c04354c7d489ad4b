"""The built-in rewards, by name: each a factory that takes options and gives a function in TRL's signature.

A score is 1.0 or 0.0 (the pocket's is between); None says that the reward does not apply to the row, as for a
reference answer that is no number. A mixed data set can so name several of them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vismem.training.rewards.answers import (
    EQUALS,
    completion_text,
    extract_answer,
    find_answer,
    normalise,
    number_alone,
    numbers,
    plain,
    prompt_text,
)
from vismem.training.rewards.errors import FAILURES, RowError
from vismem.training.rewards.judge import judge

RewardFunction = Callable[..., Sequence[float | None]]
LONGEST_FORMULA = 500  # characters; a longer one is no answer, and takes long to parse
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def per_row(
    name: str, score: Callable[..., float | None], *columns: str, optional: Sequence[str] = ()
) -> RewardFunction:
    """A reward from `score(prompt, completion, *columns, *optional)` on one row's texts and values.

    `score` gets all reference answers as `answer`, where the row has several; the best of them counts.

    Raises (when called):
        ValueError: if one of `columns` is not there; `optional` ones are None then.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> list[float | None]:
        for column in columns:
            if column not in given:
                raise ValueError(
                    f"the reward {name!r} needs a column {column!r}; there are {', '.join(given) or 'none'}"
                )
        given = {**given, "answer": given["references"]} if "references" in given and "answer" in given else given
        scores = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            values = [given[column][row] for column in columns]
            values += [given[column][row] if column in given else None for column in optional]
            try:
                scores.append(score(prompt, completion_text(completion), *values))
            except FAILURES as error:
                raise RowError(row) from error
        return scores

    reward.__name__ = name
    return reward


def _references(answer: Any) -> list[str]:
    """The reference answers as texts: one, or several where the column holds lists."""
    several = answer if isinstance(answer, (list, tuple)) else [answer]
    return [str(one) for one in several if one is not None and str(one).strip()]


def _any(hits: Sequence[bool | None]) -> float | None:
    """1.0 if one of the references was met, None if none of them can be compared."""
    known = [hit for hit in hits if hit is not None]
    return float(any(known)) if known else None


def exact() -> RewardFunction:
    """The answer is the reference, but for case, punctuation around it, a leading article and markup."""

    def score(prompt: Any, text: str, answer: Any) -> float | None:
        said = normalise(extract_answer(text))
        return _any([said == normalise(extract_answer(one)) for one in _references(answer)])

    return per_row("exact", score, "answer")


def contains() -> RewardFunction:
    """The completion has the reference somewhere in it, as whole words."""

    def score(prompt: Any, text: str, answer: Any) -> float | None:
        said = plain(text).casefold()
        wanted = [normalise(one) for one in _references(answer)]
        return _any([bool(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", said)) for one in wanted if one])

    return per_row("contains", score, "answer")


def yes_no() -> RewardFunction:
    """The answer agrees with the reference, a yes or no (true, false)."""

    def score(prompt: Any, text: str, answer: Any) -> float | None:
        wanted = [read_yes_no(one) for one in _references(answer)]
        said = read_yes_no(extract_answer(text))
        return _any([None if one is None else said == one for one in wanted])

    return per_row("yes_no", score, "answer")


def read_yes_no(text: str) -> bool | None:
    """True for yes, False for no: the first word if a stop follows it, else the only one of the two that occurs."""
    text = plain(text).casefold().strip(" .!?\"'()")
    first = re.match(r"(yes|true|no|false)\b(?=\s*(?:[,.;:!-]|$))", text)
    words = {first.group(1)} if first else set(re.findall(r"(?<!\w)(yes|true|no|false)(?!\w)", text))
    sides = {word in ("yes", "true") for word in words}
    return sides.pop() if len(sides) == 1 else None


def numeric(relative: float = 1e-6, absolute: float = 1e-9) -> RewardFunction:
    """The answer is the reference number, to within the larger of the two tolerances.

    The reference must be one number, with its unit if any. Of several numbers in a marked answer the first counts (or
    what follows the last "="), in an unmarked text the last. A number with per cent matches one without by its figure
    or by its value: 45 % is 45, and 0.45.
    """
    for name, value in (("relative", relative), ("absolute", absolute)):
        if not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"the option {name!r} must be 0 or more, got {value!r}")

    def near(said: float, wanted: float) -> bool:
        return abs(said - wanted) <= max(absolute, relative * abs(wanted))

    def score(prompt: Any, text: str, answer: Any) -> float | None:
        references = [found for one in _references(answer) if (found := number_alone(extract_answer(one)))]
        said = _read_numbers(*find_answer(text))
        if not said:
            return _any([False] * len(references))
        hits = []
        for wanted in references:
            hit = near(said[0].value, wanted.value)
            if said[0].percent and not wanted.percent:
                hit = hit or near(said[0].value / 100, wanted.value)
            elif wanted.percent and not said[0].percent:
                hit = hit or near(said[0].value, wanted.value / 100)
            hits.append(hit)
        return _any(hits)

    return per_row("numeric", score, "answer")


def _read_numbers(text: str, marked: bool) -> list[Any]:
    """The numbers of an answer, the one that counts first."""
    parts = re.split(EQUALS, text)
    ending = numbers(re.sub(r"^\s*([-+\u2212\u2013])\s+(?=[\d.])", r"\1", parts[-1]) if marked else parts[-1])
    if marked or (len(parts) > 1 and ending):
        return ending or numbers(text)[::-1]
    return ending[::-1]


def choice() -> RewardFunction:
    """The answer names the right option, by its letter or its text.

    Options come from the column `choices` (a list, or a dictionary by letter), else from lines "A. ..." or from
    "(A) ... (B) ..." in the prompt. None where the reference is no letter and no option.
    """

    def score(prompt: Any, text: str, answer: Any, choices: Any) -> float | None:
        options = read_options(prompt_text(prompt), choices)
        wanted = [read_choice(extract_answer(one), options) for one in _references(answer)]
        said = read_choice(extract_answer(text), options)
        return _any([None if one is None else said == one for one in wanted])

    return per_row("choice", score, "answer", optional=["choices"])


def read_options(prompt: str, choices: Any = None) -> dict[str, str]:
    """Options by capital letter; empty if there are none to be found."""
    if isinstance(choices, Mapping):
        named = {str(key).strip(" ().:").upper(): str(value) for key, value in choices.items() if value is not None}
        if {"TEXT", "LABEL"} <= set(named):  # the layout of ARC and its kin
            return {
                str(label).upper(): str(text) for label, text in zip(choices["label"], choices["text"], strict=True)
            }
        return named
    if isinstance(choices, (list, tuple)) and choices:
        texts = [
            re.sub(rf"^\s*\(?{letter}[.):]\s*", "", str(one)) for letter, one in zip(LETTERS, choices, strict=False)
        ]
        return dict(zip(LETTERS, texts, strict=False))
    lines = re.findall(r"^[\s*-]*[(\[]?([A-Z])[)\].:][\s*]*(\S.*?)\s*$", prompt, re.MULTILINE)
    inline = re.findall(r"\(([A-Z])\)\s*(.*?)[\s,;]*(?=\([A-Z]\)|$)", prompt, re.DOTALL)
    for found in (lines, inline):
        options: dict[str, str] = {}
        for letter, text in found:
            if letter == LETTERS[len(options)]:  # A, then B, and so on; other lines are no options
                options[letter] = text
        if len(options) > 1:
            return options
    return {}


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a text names, None if it names none or several."""
    text = plain(text).strip(" *\"'")
    bare = re.fullmatch(
        r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\s*:?\s*)?[(\[]?([A-Za-z])[)\].:,]*", text, re.I
    )
    if bare and _known(bare.group(1), options):
        return bare.group(1).upper()
    texts = {letter: normalise(option) for letter, option in options.items()}
    same = [letter for letter, option in texts.items() if option and option == normalise(text)]
    if len(same) == 1:
        return same[0]
    lead = re.match(r"(?:(?:option|choice)\s+)?(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[).:](?=\s|$))", text, re.IGNORECASE)
    lead = lead or re.match(r"(?:option|choice)\s+([A-Za-z])(?!\w)()", text, re.IGNORECASE)
    if lead and _known(lead.group(1) or lead.group(2), options):
        return (lead.group(1) or lead.group(2)).upper()
    said = normalise(text)
    inside = {
        letter for letter, option in texts.items() if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)
    }
    inside = {one for one in inside if not any(one != other and texts[one] in texts[other] for other in inside)}
    if len(inside) == 1:
        return inside.pop()
    named = re.findall(
        r"\(([A-Za-z])\)|\b(?:option|choice)\s+([A-Za-z])\b|(?<![\w'])([B-HJ-Z])(?![\w'])|\bis\s+([AI])\W*$", text
    )
    letters = {"".join(found).upper() for found in named}
    letters = {letter for letter in letters if _known(letter, options)}
    return letters.pop() if len(letters) == 1 and not inside else None


def _known(letter: str, options: Mapping[str, str]) -> bool:
    return letter.upper() in options if options else letter.upper() in LETTERS


def math(timeout: int | None = 5) -> RewardFunction:
    """The answer is mathematically equal to the reference, by `math-verify` (of the extra `train`).

    Args:
        timeout: seconds for one parsing or comparison; it needs signals, so other threads than the main one go without.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ValueError("the reward 'math' needs the package math-verify: pip install 'vismem[train]'") from error

    def read(text: str, seconds: int | None) -> list[Any]:
        formula = f"${text}$" if re.search(r"[\\^_{}=+*/()\d]", text) and "$" not in text else text
        return parse(formula, parsing_timeout=seconds) or parse(text, parsing_timeout=seconds)

    def score(prompt: Any, text: str, answer: Any) -> float | None:
        seconds = timeout if threading.current_thread() is threading.main_thread() else None
        said, marked = find_answer(text)
        if marked or len(said) < 60:
            found = read(said, seconds) if len(said) <= LONGEST_FORMULA else []
        else:
            found = parse(said[-4 * LONGEST_FORMULA :], parsing_timeout=seconds)
        wanted = [read(extract_answer(one), seconds) for one in _references(answer)]
        hits = [
            verify(one, found, timeout_seconds=seconds) if one and found else (False if one else None) for one in wanted
        ]
        return _any(hits)

    return per_row("math", score, "answer")


FORMATS = {
    "boxed": re.compile(r"\\boxed\s*\{\s*[^\s}]"),
    "answer": re.compile(r"<answer>\s*(?!</answer>)\S.*?</answer>", re.DOTALL),
}


def format_of(pattern: str = "any", whole: bool = False) -> RewardFunction:
    """The completion gives its answer in a set form.

    Args:
        pattern: "boxed" for \\boxed{...}, "answer" for one <answer>...</answer>, "any" for either, or a regular
            expression (a dot matches line breaks too).
        whole: the expression must match all of the completion, not some of it.
    """
    try:
        wanted = [FORMATS[pattern]] if pattern in FORMATS else [re.compile(pattern, re.DOTALL)]
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    if pattern == "any":
        wanted = list(FORMATS.values())

    def score(prompt: Any, text: str) -> float | None:
        if wanted[-1] is FORMATS["answer"] and text.count("<answer>") > 1:
            return 0.0
        return float(any(one.fullmatch(text.strip()) if whole else one.search(text) for one in wanted))

    return per_row("format", score)


def boxed() -> RewardFunction:
    """The completion has its answer in \\boxed{...}."""
    return format_of("boxed")


def pocket() -> RewardFunction:
    """The score of a pocket question, from the columns `task` and `answer`; None where there is no task."""

    def score(prompt: Any, text: str, task: Any, answer: Any) -> float | None:
        from vismem.pocket.tasks import score as score_pocket

        return (
            None if task is None else max((score_pocket(task, text, one) for one in _references(answer)), default=0.0)
        )

    return per_row("pocket", score, "task", "answer")


BUILT_IN: dict[str, Callable[..., RewardFunction]] = {
    "exact": exact,
    "choice": choice,
    "yes_no": yes_no,
    "numeric": numeric,
    "math": math,
    "boxed": boxed,
    "format": format_of,
    "contains": contains,
    "judge": judge,
    "pocket": pocket,
}
