"""A conversation as one HTML file: pictures, answers with chips, and every panel, with nothing to load from elsewhere.

Chips lead to their panels by address alone, so the page needs no script; printed, it shows all panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from PIL import Image

import vismem
from vismem.analysis.findings import Inspection
from vismem.app.maps import data_url
from vismem.app.panels import CSS, answer_html, environment, panel, timeline
from vismem.data.images import to_rgb
from vismem.decoding.markers import Piece

LARGEST = 720  # pixels of the longer side of a picture


@dataclass(frozen=True)
class Reply:
    """One answer to a question.

    Args:
        name: what tells it from another answer to the same question, as `"with memory"` or `"without"`.
        pieces: its words and marks (`Inspection.pieces`).
        inspection: of it; None leaves out timeline and panels, as for an answer that was given up.
        settings: how it was written, as text by name.
    """

    name: str
    pieces: Sequence[Piece]
    inspection: Inspection | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """A question with its answers.

    Args:
        question: as it was asked.
        answers: one, or several side by side.
        pictures: those that came with this question.
        settings: of all its answers, as text by name.
    """

    question: str
    answers: Sequence[Reply]
    pictures: Sequence[Image.Image] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """What is exported.

    Args:
        turns: in order.
        title: of the page.
        settings: of all turns, as the model and its memory, as text by name.
    """

    turns: Sequence[Turn]
    title: str = "A conversation with memory"
    settings: Mapping[str, str] = field(default_factory=dict)


def page(conversation: Conversation) -> str:
    """A conversation as one self-contained HTML page.

    Example:
        >>> reply = Reply("with memory", inspection.pieces, inspection)
        >>> Path("answer.html").write_text(page(Conversation([Turn(question, [reply], [picture])])), encoding="utf-8")
    """
    turns = [
        {
            "turn": turn,
            "number": number,
            "pictures": [picture_url(picture) for picture in turn.pictures],
            "replies": [shown(reply, number, place) for place, reply in enumerate(turn.answers)],
        }
        for number, turn in enumerate(conversation.turns)
    ]
    return environment.get_template("page.html").render(
        conversation=conversation, turns=turns, css=Markup(CSS), version=vismem.__version__
    )


def shown(reply: Reply, turn: int, place: int) -> dict[str, Any]:
    """One answer's fragments."""
    key, found = f"{turn}-{place}", reply.inspection
    links = f"vm-{key}" if found is not None else None
    answer = answer_html(reply.pieces, turn=turn, side=reply.name, links=links)
    strip, panels = "", []
    if found is not None:
        strip = timeline(found.tokens, found.attention, turn=turn, side=reply.name, links=links)
        panels = [Markup(panel(found, moment.index, key=key)) for moment in found.moments]
    return {"reply": reply, "key": key, "answer": Markup(answer), "timeline": Markup(strip), "panels": panels}


def picture_url(picture: Image.Image) -> str:
    """A picture as an address, of `LARGEST` pixels at most."""
    copy = to_rgb(picture)
    copy.thumbnail((LARGEST, LARGEST))
    return data_url(copy)
