"""Exports a conversation as one self-contained HTML file: pictures, answers with chips, and every panel.

Chips link to their panels by fragment, so the page needs no script; printing shows all panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

import vismem
from vismem.analysis.findings import Inspection
from vismem.app.maps import data_url
from vismem.app.panels import CSS, answer_html, environment, panel, timeline
from vismem.app.rendering import facts, policy_label
from vismem.data.images import to_rgb
from vismem.decoding.markers import Piece
from vismem.deprecation import renamed

if TYPE_CHECKING:
    from vismem.app.chat import Chat
    from vismem.app.session import Conversation, Reply, Turn

MAX_SIDE = 720  # pixels, longer side of an exported picture


@dataclass(frozen=True)
class ExportedAnswer:
    """One answer to a question.

    Args:
        name: heading, such as `"with memory"` or `"without memory"`.
        pieces: its text and invocations (`Inspection.pieces`).
        inspection: None leaves out timeline and panels, as for a cancelled answer.
        settings: shown below the answer, as text by name.
    """

    name: str
    pieces: Sequence[Piece]
    inspection: Inspection | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportedTurn:
    """A question with its answers.

    Args:
        question: the text.
        answers: one, or several to show side by side.
        pictures: those that came with this question.
        settings: common to all its answers, as text by name.
    """

    question: str
    answers: Sequence[ExportedAnswer]
    pictures: Sequence[Image.Image] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportedConversation:
    """The contents of one page.

    Args:
        turns: in order.
        title: of the page.
        settings: common to all turns, such as the model and its memory, as text by name.
    """

    turns: Sequence[ExportedTurn]
    title: str = "A conversation with memory"
    settings: Mapping[str, str] = field(default_factory=dict)


def exported(chat: Chat, conversation: Conversation) -> str:
    """A visitor's conversation as an HTML page. Waits for all inspections; leaves out an unfinished turn."""
    settings = {"model": chat.loaded.base, "memory": chat.loaded.checkpoint or "untrained"}
    turns = [exported_turn(chat, turn) for turn in conversation.turns if turn.over]
    return page(ExportedConversation(turns, title="A conversation with VisMem", settings=settings))


def exported_turn(chat: Chat, turn: Turn) -> ExportedTurn:
    settings = {"invocation": policy_label(turn.settings.invocation)}
    if turn.settings.temperature:
        settings |= {"temperature": f"{turn.settings.temperature:g}", "seed": str(turn.settings.seed)}
    return ExportedTurn(
        turn.question, [exported_answer(chat, turn, reply) for reply in turn.replies], turn.pictures, settings
    )


def exported_answer(chat: Chat, turn: Turn, reply: Reply) -> ExportedAnswer:
    try:
        inspection = chat.inspect(turn, reply.side).result()
    except Exception:  # cancelled, or out of memory: the text is still worth exporting
        inspection = None
    name = "without memory" if reply.side == "vanilla" else "with memory"
    settings = {"notes": ", ".join(facts(turn, reply))}
    if reply.error:
        settings["error"] = reply.error
    return ExportedAnswer(name, reply.pieces, inspection, settings)


def page(conversation: ExportedConversation) -> str:
    """A conversation as one self-contained HTML page.

    Example:
        >>> answer = ExportedAnswer("with memory", inspection.pieces, inspection)
        >>> html = page(ExportedConversation([ExportedTurn(question, [answer], [picture])]))
        >>> Path("answer.html").write_text(html, encoding="utf-8")
    """
    turns = [
        {
            "turn": turn,
            "number": number,
            "pictures": [picture_url(picture) for picture in turn.pictures],
            "replies": [answer_fragments(answer, f"{number}-{i}", number) for i, answer in enumerate(turn.answers)],
        }
        for number, turn in enumerate(conversation.turns)
    ]
    return environment.get_template("page.html").render(
        conversation=conversation, turns=turns, css=Markup(CSS), version=vismem.__version__
    )


def answer_fragments(answer: ExportedAnswer, key: str, turn: int) -> dict[str, Any]:
    """One answer's HTML fragments; `key` is unique on the page."""
    inspection = answer.inspection
    links = f"vm-{key}" if inspection is not None else None
    strip, panels = "", []
    if inspection is not None:
        strip = timeline(inspection.tokens, inspection.attention, turn=turn, side=answer.name, links=links)
        panels = [Markup(panel(inspection, moment.index, key=key)) for moment in inspection.moments]
    return {
        "reply": answer,
        "key": key,
        "answer": Markup(answer_html(answer.pieces, turn=turn, side=answer.name, links=links)),
        "timeline": Markup(strip),
        "panels": panels,
    }


def picture_url(picture: Image.Image) -> str:
    """A picture as a data URL, at most `MAX_SIDE` pixels wide and high."""
    copy = to_rgb(picture)
    copy.thumbnail((MAX_SIDE, MAX_SIDE))
    return data_url(copy)


__getattr__ = renamed(
    __name__, {"Conversation": "ExportedConversation", "Reply": "ExportedAnswer", "Turn": "ExportedTurn"}
)
