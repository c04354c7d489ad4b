"""The built-in rewards: each is a factory that takes options and returns a function with TRL's signature.

A score is 1.0 or 0.0 (`pocket` also gives values between), or None if the reward does not apply to the row, for
example because the reference answer is not a number. So a mixed dataset can combine several rewards.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vismem.training.rewards.answers import (
    EQUALS,
    ParsedNumber,
    completion_text,
    extract_answer,
    find_answer,
    normalise,
    number_alone,
    numbers,
    plain,
    prompt_text,
    references,
)
from vismem.training.rewards.errors import FAILURES, RowError
from vismem.training.rewards.judge import judge

RewardFunction = Callable[..., Sequence[float | None]]
LONGEST_FORMULA = 500  # characters; longer text is not an answer and slow to parse
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def per_row(
    name: str, score: Callable[..., float | None], *columns: str, optional: Sequence[str] = ()
) -> RewardFunction:
    """Turns `score(prompt, completion, *columns, *optional)`, which scores one row, into a reward function.

    `answer` holds all reference answers if the row has several; the best score counts.

    Raises (when called):
        ValueError: if one of `columns` is missing; a missing `optional` column is None.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> list[float | None]:
        for column in columns:
            if column not in given:
                raise ValueError(
                    f"the reward {name!r} needs a column {column!r}; the columns are {', '.join(given) or 'none'}"
                )
        if "references" in given and "answer" in given:
            given["answer"] = given["references"]
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


def _any(hits: Sequence[bool]) -> float | None:
    """1.0 if any reference matches, None if there is none to compare with."""
    return float(any(hits)) if hits else None


def _holds(text: str, words: str) -> bool:
    """Whether a text contains some words, and not just as parts of longer ones."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def exact() -> RewardFunction:
    """The answer equals the reference, ignoring case, surrounding punctuation, a leading article and markup."""

    def score(_prompt: Any, text: str, answer: Any) -> float | None:
        found = normalise(extract_answer(text))
        return _any([found == normalise(extract_answer(one)) for one in references(answer)])

    return per_row("exact", score, "answer")


def contains() -> RewardFunction:
    """The completion contains the reference, as whole words."""

    def score(_prompt: Any, text: str, answer: Any) -> float | None:
        found = plain(text).casefold()
        return _any([_holds(found, one) for one in map(normalise, references(answer)) if one])

    return per_row("contains", score, "answer")


def yes_no() -> RewardFunction:
    """The answer agrees with the reference, which is yes or no (or true or false)."""

    def score(_prompt: Any, text: str, answer: Any) -> float | None:
        found = read_yes_no(extract_answer(text))
        return _any([found == one for one in map(read_yes_no, references(answer)) if one is not None])

    return per_row("yes_no", score, "answer")


def read_yes_no(text: str) -> bool | None:
    """True for yes, False for no: the first word if punctuation follows it, else the only one of them in the text."""
    text = plain(text).casefold().strip(" .!?\"'()")
    first = re.match(r"(yes|true|no|false)\b(?=\s*(?:[,.;:!-]|$))", text)
    words = {first.group(1)} if first else set(re.findall(r"(?<!\w)(yes|true|no|false)(?!\w)", text))
    sides = {word in ("yes", "true") for word in words}
    return sides.pop() if len(sides) == 1 else None


def numeric(relative: float = 1e-6, absolute: float = 1e-9) -> RewardFunction:
    """The answer equals the reference number, within the larger of the two tolerances.

    The reference must be one number, optionally with a unit. If an answer has several numbers, the first one counts
    (or the one after the last "="); in text without a marked answer, the last one. A percentage matches its number or
    its value: 45 % equals 45 and 0.45.
    """
    for name, value in (("relative", relative), ("absolute", absolute)):
        if not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"the option {name!r} must be 0 or more, got {value!r}")

    def near(value: float, wanted: float) -> bool:
        return abs(value - wanted) <= max(absolute, relative * abs(wanted))

    def score(_prompt: Any, text: str, answer: Any) -> float | None:
        answer_text, marked = find_answer(text)
        found = _read_number(answer_text, marked=marked)
        hits = []
        for wanted in filter(None, (number_alone(extract_answer(one)) for one in references(answer))):
            hit = found is not None and near(found.value, wanted.value)
            if found is not None and found.percent != wanted.percent:
                ours, theirs = (100 if number.percent else 1 for number in (found, wanted))
                hit = hit or near(found.value / ours, wanted.value / theirs)
            hits.append(hit)
        return _any(hits)

    return per_row("numeric", score, "answer")


def _read_number(text: str, *, marked: bool) -> ParsedNumber | None:
    """The number that counts in an answer."""
    parts = re.split(EQUALS, text)
    ending = parts[-1]
    if marked:
        ending = re.sub(r"^\s*([-+\u2212\u2013])\s+(?=[\d.])", r"\1", ending)  # "the answer is - 3"
    if found := numbers(ending):
        return found[0] if marked or len(parts) > 1 else found[-1]
    found = numbers(text) if marked else []
    return found[-1] if found else None


def choice() -> RewardFunction:
    """The answer names the right option, by letter or text.

    Options come from the column `choices` (a list, or a dictionary by letter), or else from lines "A. ..." or from
    "(A) ... (B) ..." in the prompt. None if the reference is neither a letter nor an option.
    """

    def score(prompt: Any, text: str, answer: Any, choices: Any) -> float | None:
        options = read_options(prompt_text(prompt), choices)
        found, *wanted = (read_choice(extract_answer(one), options) for one in (text, *references(answer)))
        return _any([found == one for one in wanted if one is not None])

    return per_row("choice", score, "answer", optional=["choices"])


def read_options(prompt: str, choices: Any = None) -> dict[str, str]:
    """Options by capital letter; empty if none are found."""
    if isinstance(choices, Mapping):
        named = {str(key).strip(" ().:").upper(): str(value) for key, value in choices.items() if value is not None}
        if {"TEXT", "LABEL"} <= set(named):  # the layout of ARC
            pairs = zip(choices["label"], choices["text"], strict=True)
            return {str(label).upper(): str(text) for label, text in pairs}
        return named
    if isinstance(choices, (list, tuple)) and choices:
        pairs = zip(LETTERS, map(str, choices), strict=False)
        return {letter: re.sub(rf"^\s*\(?{letter}[.):]\s*", "", text) for letter, text in pairs}
    lines = re.findall(r"^[\s*-]*[(\[]?([A-Z])[)\].:][\s*]*(\S.*?)\s*$", prompt, re.MULTILINE)
    inline = re.findall(r"\(([A-Z])\)\s*(.*?)[\s,;]*(?=\([A-Z]\)|$)", prompt, re.DOTALL)
    for found in (lines, inline):
        options: dict[str, str] = {}
        for letter, text in found:
            if letter == LETTERS[len(options)]:  # A, then B, and so on; other lines are not options
                options[letter] = text
        if len(options) > 1:
            return options
    return {}


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option named in a text; None if it names none or several."""
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
    inside = {letter for letter, option in texts.items() if option and _holds(said, option)}
    inside = {one for one in inside if not any(one != other and texts[one] in texts[other] for other in inside)}
    if len(inside) == 1:
        return inside.pop()
    named = re.findall(
        r"\(([A-Za-z])\)|\b(?:option|choice)\s+([A-Za-z])\b|(?<![\w'])([B-HJ-Z])(?![\w'])|\bis\s+([AI])\W*$", text
    )
    letters = {letter for found in named if _known(letter := "".join(found).upper(), options)}
    return letters.pop() if len(letters) == 1 and not inside else None


def _known(letter: str, options: Mapping[str, str]) -> bool:
    return letter.upper() in options if options else letter.upper() in LETTERS


def math(timeout: int | None = 5) -> RewardFunction:
    """The answer is mathematically equal to the reference, by `math-verify` (in the extra `train`).

    Args:
        timeout: seconds per parse or comparison; uses signals, so it only works in the main thread.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ValueError("the reward 'math' needs the package math-verify: pip install 'vismem[train]'") from error

    def read(text: str, seconds: int | None) -> list[Any]:
        formula = f"${text}$" if re.search(r"[\\^_{}=+*/()\d]", text) and "$" not in text else text
        return parse(formula, parsing_timeout=seconds) or parse(text, parsing_timeout=seconds)

    def score(_prompt: Any, text: str, answer: Any) -> float | None:
        seconds = timeout if threading.current_thread() is threading.main_thread() else None
        stated, marked = find_answer(text)
        if marked or len(stated) < 60:
            found = read(stated, seconds) if len(stated) <= LONGEST_FORMULA else []
        else:
            found = parse(stated[-4 * LONGEST_FORMULA :], parsing_timeout=seconds)
        wanted = [read(extract_answer(one), seconds) for one in references(answer)]
        return _any([bool(found) and verify(one, found, timeout_seconds=seconds) for one in wanted if one])

    return per_row("math", score, "answer")


FORMATS = {
    "boxed": re.compile(r"\\boxed\s*\{\s*[^\s}]"),
    "answer": re.compile(r"<answer>\s*(?!</answer>)\S.*?</answer>", re.DOTALL),
}


def format_of(pattern: str = "any", *, whole: bool = False) -> RewardFunction:
    """The completion gives its answer in the required format.

    Args:
        pattern: "boxed" for \\boxed{...}, "answer" for one <answer>...</answer>, "any" for either, or a regular
            expression (a dot also matches line breaks).
        whole: require the pattern to match the whole completion.
    """
    try:
        own = FORMATS.get(pattern) or re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
    wanted = list(FORMATS.values()) if pattern == "any" else [own]

    def score(_prompt: Any, text: str) -> float | None:
        if FORMATS["answer"] in wanted and text.count("<answer>") > 1:
            return 0.0
        return float(any(one.fullmatch(text.strip()) if whole else one.search(text) for one in wanted))

    return per_row("format", score)


def boxed() -> RewardFunction:
    """The completion has its answer in \\boxed{...}."""
    return format_of("boxed")


def pocket() -> RewardFunction:
    """The score of a pocket question, from the columns `task` and `answer`; None without a task."""

    def score(_prompt: Any, text: str, task: Any, answer: Any) -> float | None:
        from vismem.pocket.tasks import score as score_pocket

        if task is None:
            return None
        return max((score_pocket(task, text, one) for one in references(answer)), default=0.0)

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
