"""An inspected answer as HTML: chips in the text, a strip of its tokens, and a panel for each invocation.

Fragments need `CSS` and nothing else: no script, no file, no network. Each can be read without colour, by keyboard, in
light and dark, and on a narrow screen. What the numbers are is said in `inspection.py`; whole pages are `export.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from vismem.analysis.findings import AnswerToken, InspectedInvocation, Inspection
from vismem.analysis.templates import templates_of
from vismem.app.maps import data_url, look
from vismem.config import Kind
from vismem.decoding.markers import SHAPES, Piece

CSS: str = files("vismem.app").joinpath("templates/viewer.css").read_text(encoding="utf-8")
MOST_WORDS = 240  # tokens that a panel draws one by one
STRONGEST = 3  # words that get their number
FEWEST = 12  # tokens drawn at least; then up to the last whose share is not faint
FAINT = 0.001

environment = templates_of("vismem.app")


def answer_html(
    pieces: Sequence[Piece],
    *,
    turn: int = 0,
    side: str = "memory",
    selected: int | None = None,
    links: str | None = None,
    writing: bool = False,
) -> str:
    """An answer's words, with a chip at each invocation.

    Args:
        pieces: as `evaluation.marks.pieces` gives them, or `Inspection.pieces`.
        turn, side: what the chips carry as `data-turn` and `data-side`; `data-index` is the invocation's.
        selected: the invocation whose panel is open.
        links: chips lead to `#<links>-<index>` instead of being buttons, for pages without a script.
        writing: the answer is still being written: a cursor stands at its end.
    """
    return environment.get_template("answer.html").render(
        pieces=pieces, turn=turn, side=side, selected=selected, links=links, writing=writing, shapes=SHAPES
    )


def timeline(
    tokens: Sequence[AnswerToken],
    attention: Mapping[Kind, Sequence[float]] | None = None,
    *,
    turn: int = 0,
    side: str = "memory",
    selected: int | None = None,
    links: str | None = None,
) -> str:
    """A strip of an answer's tokens with a mark at each invocation, and how much each token attended to memory.

    Args:
        tokens: `Inspection.tokens`, or `inspection.answer_tokens(...)` of an answer that is still being written.
        attention: `Inspection.attention`, where there is one.
        turn, side, selected, links: as for `answer_html`.
    """
    attention = attention or {}
    none = [0.0] * len(tokens)
    short, long = attention.get("short", none), attention.get("long", none)
    most = max((a + b for a, b in zip(short, long, strict=True)), default=0.0)
    return environment.get_template("timeline.html").render(
        tokens=[
            {"token": token, "name": named(token), "short": short[i], "long": long[i], "place": i}
            for i, token in enumerate(tokens)
        ],
        count=sum(token.part == "mark" for token in tokens),
        most=most,
        turn=turn,
        side=side,
        selected=selected,
        links=links,
        shapes=SHAPES,
    )


def panel(inspection: Inspection, index: int, vector: int | None = None, *, key: str = "0") -> str:
    """All that is known of one invocation, as one fragment.

    Args:
        inspection: the answer's.
        index: of the invocation.
        vector: of the memory, to be shown first; None is the mean of all.
        key: tells this answer from others on the same page.

    Raises:
        ValueError: if there is no such invocation or vector.
    """
    if not 0 <= index < len(inspection.moments):
        raise ValueError(f"there is no invocation {index}; the answer has {len(inspection.moments)}")
    moment = inspection.moments[index]
    if vector is not None and not 0 <= vector < moment.vectors:
        raise ValueError(f"there is no vector {vector}; the memory has {moment.vectors}")
    return environment.get_template("panel.html").render(
        moment=moment,
        key=f"vm-{key}-{index}",
        shape=SHAPES[moment.kind],
        before="".join(token.text for token in inspection.tokens[: moment.position] if token.part == "word")[-60:],
        looks=[look(each, inspection.pictures[each.picture]) for each in moment.looked.maps] if moment.looked else [],
        total=len(inspection.moments),
        several=len(inspection.pictures) > 1,
        shares=shares(moment),
        words=words(inspection, moment),
        unread=0 if moment.read is None else max(len(moment.read.mean) - MOST_WORDS, 0),
        later=later(inspection, moment),
        groups=groups(moment),
        likely=likely(moment),
        chosen=vector,
    )


# What a template is given.


SHARES = {
    "picture": "picture",
    "padding": "padding around it",
    "class token": "class token",
    "segment": "words of the segment",
    "query": "its query",
    "memory": "itself",
}


def shares(moment: InspectedInvocation) -> list[dict[str, Any]]:
    """Where a memory's attention went while it was formed."""
    found = moment.looked or moment.read
    return (
        []
        if found is None
        else [{"name": SHARES[name], "share": share} for name, share in found.shares.items() if share > 0]
    )


def words(inspection: Inspection, moment: InspectedInvocation) -> list[dict[str, Any]]:
    """A long memory's segment: for the mean and for each vector its last words with their strength."""
    if moment.read is None:
        return []
    end = moment.read.start + len(moment.read.mean)
    rows = [("mean of all vectors", "mean", moment.read.mean)]
    rows += [(f"vector {i + 1}", str(i + 1), row) for i, row in enumerate(moment.read.vectors)]
    found = []
    for title, name, weights in rows:
        shares = (weights / max(float(weights.mean()), 1e-12))[-MOST_WORDS:]  # 1 is the even share within the segment
        most, strongest = max(2.0, float(shares.max())), set(np.argsort(-shares)[:STRONGEST].tolist())
        found.append(
            {
                "title": title,
                "name": name,
                "words": [
                    {"token": token, "times": float(share), "strength": float(share) / most, "strong": i in strongest}
                    for i, (token, share) in enumerate(
                        zip(inspection.tokens[end - len(shares) : end], shares, strict=True)
                    )
                ],
            }
        )
    return found


def later(inspection: Inspection, moment: InspectedInvocation) -> dict[str, Any] | None:
    """The tokens after an invocation with what its slots got, up to the last that attended to them."""
    if moment.later is None:
        return None
    every, start = moment.later.shares, moment.later.start
    most = max(every)
    last = max((i for i, share in enumerate(every) if share >= FAINT), default=0)
    shown = every[: min(max(last + 1, FEWEST), MOST_WORDS)]
    strongest = set(np.argsort([-share for share in shown])[:STRONGEST].tolist())
    return {
        "most": most,
        "words": [
            {
                "name": named(inspection.tokens[start + i]),
                "token": inspection.tokens[start + i],
                "share": share,
                "height": share / most if most else 0.0,
                "strong": i in strongest and share >= FAINT,
            }
            for i, share in enumerate(shown)
        ],
        "rest": len(every) - len(shown),
        "rest_most": max(every[len(shown) :], default=0.0),
    }


def groups(moment: InspectedInvocation) -> list[dict[str, Any]]:
    """Where the attention of later tokens went, and how many places each group has."""
    if moment.later is None:
        return []
    found, places = moment.later.groups, moment.later.places
    return [{"name": name, "share": share, "places": places[name]} for name, share in found.items() if places[name]]


def likely(moment: InspectedInvocation) -> dict[str, Any] | None:
    """The next word's distribution with and without the memory, and what it comes to in a sentence."""
    if moment.next is None:
        return None
    found = moment.next.candidates
    given, without = max(found, key=lambda each: each.given), max(found, key=lambda each: each.without)
    return {"rows": found, "kl": moment.next.kl, "given": given, "without": without, "put_in": moment.next.put_in}


def named(token: AnswerToken) -> str:
    """A token in words, for titles and screen readers."""
    if token.part == "mark":
        return f"{token.kind}-term memory {(token.index or 0) + 1}"
    if token.part == "end":
        return "end of the memory"
    if token.part == "special":
        return token.text
    if token.part == "stop":
        return "end of the answer"
    return visible(token.text) or "a part of a character"


def visible(text: str) -> str:
    """A token's text without the space before it, line ends as a sign."""
    return text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥").strip(" ") or ("space" if text else "")


def percent(share: float) -> str:
    """A share as text, of two digits at most where it is small.

    Example:
        >>> percent(0.1234), percent(0.00002)
        ('12 %', '<0.1 %')
    """
    if 0 < share < 0.001:
        return "<0.1\u202f%"
    if share > 0.999 and share < 1:
        return ">99.9\u202f%"
    digits = 0 if share >= 0.0995 or share == 0 else 1
    return f"{100 * share:.{digits}f}\u202f%"


def times(value: float) -> str:
    """How many times the even share."""
    return f"{value:.1f}\u00d7" if value < 9.95 else f"{value:.0f}\u00d7"


environment.filters |= {"percent": percent, "times": times, "visible": visible}

__all__ = ["CSS", "answer_html", "data_url", "environment", "panel", "timeline"]
