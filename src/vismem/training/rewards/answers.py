"""Reading text: what a completion says, where in it the answer stands, and texts and numbers brought to one form.

Pure functions on strings; the rewards in `builtin.py` compare what these find.
"""

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
_PLAIN = {ord(mark): "-" for mark in "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d"} | {
    ord("\u2018"): "'",
    ord("\u2019"): "'",
    ord("\u201c"): '"',
    ord("\u201d"): '"',
    ord("\u00d7"): "x",
    ord("\u2044"): "/",
}


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or TRL's list of messages, of which the last of the assistant counts."""
    if isinstance(completion, str):
        return completion
    messages = [completion] if isinstance(completion, Mapping) else list(completion or [])
    said = [message for message in messages if message.get("role", "assistant") == "assistant"]
    return _content(said[-1].get("content")) if said else ""


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: a string, or the texts of all its user messages, a line each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(_content(message.get("content")) for message in prompt or [] if message.get("role") == "user")


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def extract_answer(text: str) -> str:
    """The answer that a text states: in <answer>...</answer>, in \\boxed{...}, or after "answer is" or "Answer:".

    What stands up to a closing </think> is left out. Of several statements the last counts. Without any, the whole
    text is the answer; "" if the statement is cut off.

    Example:
        >>> extract_answer("2 + 2 is four, so **the answer is \\\\boxed{4}**.")
        '4'
    """
    return find_answer(text)[0]


def find_answer(text: str) -> tuple[str, bool]:
    """`extract_answer`, and whether the text marked its answer in one of these ways."""
    text = text.rsplit("</think>", 1)[-1]
    found: list[tuple[int, str]] = []
    for match in _ANSWER_TAG.finditer(text):
        found.append((match.start(), match.group(1)))
    for match in _BOXED.finditer(text):
        found.append((match.start(), _braced(text, match.end())))
    tags = [(match.start(), match.end()) for match in _ANSWER_TAG.finditer(text)]
    for match in _ANSWER_IS.finditer(text):
        if not any(start < match.start() < end for start, end in tags):  # that is read below, within the tag
            found.append((match.start(), _statement(text[match.end() :])))
    if not found:
        return text.strip(), False
    start, inner = max(found, key=lambda one: one[0])
    inside = [one for one in tags if one[0] < start < one[1]]
    if inside:  # a box within a tag: read the tag alone
        inner = next(content for place, content in found if place == inside[-1][0])
    deeper, marked = find_answer(inner)
    return (deeper if marked else inner).strip(), True


def _braced(text: str, start: int) -> str:
    """What stands between the brace before `start` and the one that closes it (or the end)."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start:place]
    return text[start:]


def _statement(text: str) -> str:
    """The first line with words in it, up to the end of its first sentence."""
    line = next((line for line in text.splitlines() if line.strip(" *_#$")), "").strip()
    if line.rstrip("$") in ("\\[", "\\("):
        return text.strip()
    for match in _SENTENCE_END.finditer(line):
        before = re.findall(r"\w+", line[: match.start()])
        if before and before[-1].lower() not in _SHORT_FORMS and (len(before[-1]) > 1 or len(before) > 1):
            return line[: match.start()].rstrip(" *_")
    return line.rstrip(" *_")


def plain(text: str) -> str:
    """Without Markdown emphasis, LaTeX wrappers and unusual signs; case and punctuation stay."""
    text = unicodedata.normalize("NFKC", text.translate(_PLAIN)).translate(_PLAIN)
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[\[\]()]|\\left|\\right|\\displaystyle|\\[,;!]", " ", text)
    text = re.sub(r"(?<!\w)\$(?!\d)|\$(?!\w)", "", text)  # formula signs; "$5" keeps its currency
    text = re.sub(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", text)
    return " ".join(text.split())


def normalise(text: str) -> str:
    """A short answer in one form: `plain`, lower case, no leading article, no punctuation around it.

    Example:
        >>> normalise("**The red Cup.**")
        'red cup'
    """
    text = plain(text).casefold().strip(" .,;:!?\"'()[]{}#*")
    return re.sub(r"^(?:the|an|a)\s+(?=\S)", "", text)


@dataclass(frozen=True)
class Number:
    value: float
    percent: bool = False


def numbers(text: str) -> list[Number]:
    """All numbers of a text, in order: signs, thousands separators, decimals, powers of ten, fractions, per cent.

    Units may follow; digits inside words (H2O) are no numbers. A division by zero is left out.

    Example:
        >>> [number.value for number in numbers("1,234.50 m and -3/4")]
        [1234.5, -0.75]
    """
    return [number for number, _ in _found(text)]


def number_alone(text: str) -> Number | None:
    """The number that a reference answer is: the only one in it, with no other words before it than "about" or "US$".

    Example:
        >>> number_alone("5 cm").value, number_alone("1952-09-24"), number_alone("Windows 95")
        (5.0, None, None)
    """
    found = _found(re.split(EQUALS, text)[-1])
    return found[0][0] if len(found) == 1 and not _WORDS_BEFORE.sub("", found[0][1]) else None


def _found(text: str) -> list[tuple[Number, str]]:
    """Each number, and the text before it."""
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
            found.append((Number(value, bool(match["percent"])), text[: match.start()]))
    return found


def _value(match: re.Match[str]) -> float | None:
    try:
        value = float((match["whole"] or "0").replace(",", "") + (match["part"] or ""))
        if match["power"]:
            power = re.search(r"[-+]?\d+\s*\}?$", match["power"])
            assert power is not None  # the pattern has a number there
            value *= 10.0 ** int(power.group().strip(" }"))
        if match["mixed"]:
            above, below = match["mixed"].split("/")
            value += int(above) / int(below)
        if match["below"]:
            value /= float(match["below"])
    except (ZeroDivisionError, OverflowError):
        return None
    return -value if match["sign"] == "-" else value
