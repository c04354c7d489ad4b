"""Parses completions: extracts the stated answer, and normalizes text and numbers for comparison."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL)
_ANSWER_IS = re.compile(r"(?<!to )\banswer\b[\s*_]*(?:\b(?:is|was)\b[\s*_]*:?|[:=])[\s*_]*", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SENTENCE_END = re.compile(r"[.!?]['\")*_]*\s+(?=[A-Z(])")
_SHORT_FORMS = {"mr", "mrs", "ms", "dr", "st", "no", "vs", "prof", "jr", "sr", "fig", "approx"}

_NUMBER = re.compile(
    r"""
    (?<![\w./]) (?P<sign>(?<![\d)%])[-+])? (?:[$€£¥]\s?)?
    (?P<whole>[1-9]\d{0,2}(?:,\d{3})+(?!\d) | \d+ | (?=\.\d))
    (?P<part>\.\d+)?
    (?P<power>e[-+]?\d+ | \s*(?:[x*]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*[-+]?\d+\s*\}?)?
    (?P<mixed>\s+\d+/\d+(?![\d/]))?
    (?:\s*/\s*(?P<below>\d+(?:\.\d+)?)(?!\d)(?!\s*/\s*\d))?
    (?P<percent>\s*(?:\\?%|percent\b|per\ cent\b))?
    """,
    re.VERBOSE | re.IGNORECASE,
)
EQUALS = r"=|≈|\\approx"
_WORDS_BEFORE = re.compile(
    r"\b(?:about|around|approx|approximately|ca|circa|us|usd|eur|gbp|rs)\b|[\W_]+", re.IGNORECASE
)
_ASCII = {ord(dash): "-" for dash in "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d"} | {
    ord("\u2018"): "'",
    ord("\u2019"): "'",
    ord("\u201c"): '"',
    ord("\u201d"): '"',
    ord("\u00d7"): "x",
    ord("\u2044"): "/",
}


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or the last assistant message of TRL's list of messages."""
    if isinstance(completion, str):
        return completion
    messages = [completion] if isinstance(completion, Mapping) else list(completion or [])
    replies = [message for message in messages if message.get("role", "assistant") == "assistant"]
    return _content(replies[-1].get("content")) if replies else ""


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: a string, or the text of its user messages, joined by newlines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(_content(message.get("content")) for message in prompt or [] if message.get("role") == "user")


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def references(answer: Any) -> list[str]:
    """The non-empty reference answers as strings; the column may hold one or a list."""
    answers = answer if isinstance(answer, (list, tuple)) else [answer]
    return [str(one) for one in answers if one is not None and str(one).strip()]


def extract_answer(text: str) -> str:
    """The answer stated in a text: in <answer>...</answer>, in \\boxed{...}, or after "answer is" or "Answer:".

    Ignores everything up to a closing </think>. If there are several statements, the last one counts; if there is
    none, the whole text is the answer. Returns "" if the statement is truncated.

    Example:
        >>> extract_answer("2 + 2 is four, so **the answer is \\\\boxed{4}**.")
        '4'
    """
    return find_answer(text)[0]


def find_answer(text: str) -> tuple[str, bool]:
    """As `extract_answer`, and whether the text marks its answer in one of these ways."""
    text = text.rsplit("</think>", 1)[-1]
    outside = _ANSWER_TAG.sub(lambda tag: "\0" * len(tag.group()), text)  # what a tag holds is read below
    ways = ((_ANSWER_TAG, text), (_BOXED, outside), (_ANSWER_IS, outside))
    found = [match for pattern, where in ways for match in pattern.finditer(where)]
    if not found:
        return text.strip(), False
    last = max(found, key=re.Match.start)
    if last.re is _ANSWER_TAG:
        inner = last.group(1)
    else:
        inner = (_braced if last.re is _BOXED else _statement)(text[last.end() :])
    deeper, marked = find_answer(inner)
    return (deeper if marked else inner).strip(), True


def _braced(text: str) -> str:
    """The text after an opening brace, up to the closing one or the end."""
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return text


def _statement(text: str) -> str:
    """The first sentence of the first line with words in it."""
    line = next((line for line in text.splitlines() if line.strip(" *_#$")), "").strip()
    if line.rstrip("$") in ("\\[", "\\("):
        return text.strip()
    for match in _SENTENCE_END.finditer(line):
        before = re.findall(r"\w+", line[: match.start()])
        if before and before[-1].lower() not in _SHORT_FORMS and (len(before[-1]) > 1 or len(before) > 1):
            return line[: match.start()].rstrip(" *_")
    return line.rstrip(" *_")


def plain(text: str) -> str:
    """Removes Markdown emphasis and LaTeX wrappers, and normalizes Unicode; keeps case and punctuation."""
    text = unicodedata.normalize("NFKC", text.translate(_ASCII)).translate(_ASCII)
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[\[\]()]|\\left|\\right|\\displaystyle|\\[,;!]", " ", text)
    text = re.sub(r"(?<!\w)\$(?!\d)|\$(?!\w)", "", text)  # math delimiters; "$5" keeps its currency sign
    text = re.sub(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", text)
    return " ".join(text.split())


def normalise(text: str) -> str:
    """Normalizes a short answer: `plain`, lower case, without leading article and surrounding punctuation.

    Example:
        >>> normalise("**The red Cup.**")
        'red cup'
    """
    text = plain(text).casefold().strip(" .,;:!?\"'()[]{}#*")
    return re.sub(r"^(?:the|an|a)\s+(?=\S)", "", text)


@dataclass(frozen=True)
class ParsedNumber:
    value: float
    percent: bool = False


def numbers(text: str) -> list[ParsedNumber]:
    """All numbers in a text, in order, with signs, thousands separators, powers of ten, fractions and percent.

    Units may follow. Skips digits inside words (H2O) and divisions by zero.

    Example:
        >>> [number.value for number in numbers("1,234.50 m and -3/4")]
        [1234.5, -0.75]
    """
    return [number for number, _ in _find_numbers(text)]


def number_alone(text: str) -> ParsedNumber | None:
    """The number in a reference answer, if it is the only one and only words like "about" or "US$" precede it.

    Example:
        >>> number_alone("5 cm").value, number_alone("1952-09-24"), number_alone("Windows 95")
        (5.0, None, None)
    """
    found = _find_numbers(re.split(EQUALS, text)[-1])
    return found[0][0] if len(found) == 1 and not _WORDS_BEFORE.sub("", found[0][1]) else None


def _find_numbers(text: str) -> list[tuple[ParsedNumber, str]]:
    """Each number in a text, with the text before it."""
    text = re.sub(r"[⁻⁰¹²³⁴-⁹]+", lambda match: "^" + unicodedata.normalize("NFKC", match.group()), text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\*\*(?=-?\d)", "^", text.replace("{,}", ","))
    text = re.sub(r"\\[,;!]|\\(?=\$)", "", text)
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2 ", text)
    text, found = plain(text), []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None and math.isfinite(value):
            found.append((ParsedNumber(value, bool(match["percent"])), text[: match.start()]))
    return found


def _value(match: re.Match[str]) -> float | None:
    try:
        value = float((match["whole"] or "0").replace(",", "") + (match["part"] or ""))
        if match["power"]:
            power = re.search(r"[-+]?\d+\s*\}?$", match["power"])
            assert power is not None  # guaranteed by the pattern
            value *= 10.0 ** int(power.group().strip(" }"))
        if match["mixed"]:
            above, below = match["mixed"].split("/")
            value += int(above) / int(below)
        if match["below"]:
            value /= float(match["below"])
    except (ZeroDivisionError, OverflowError):
        return None
    return -value if match["sign"] == "-" else value
