"""Exports a conversation as one self-contained HTML file: pictures, answers with chips, and every panel.

Chips link to their panels by fragment, so the page needs no script; printing shows all panels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

import vismem
from vismem.analysis.heatmaps import data_url
from vismem.app.panels import CSS, answer_html, environment, panel, timeline
from vismem.app.rendering import facts, policy_label
from vismem.data.images import to_rgb

if TYPE_CHECKING:
    from vismem.app.chat import Chat
    from vismem.app.session import Conversation, Reply, Turn

MAX_SIDE = 720  # pixels, longer side of an exported picture


def exported(chat: Chat, conversation: Conversation) -> str:
    """A visitor's conversation as an HTML page. Waits for all inspections; leaves out an unfinished turn."""
    over = [turn for turn in conversation.turns if turn.over]
    return environment.get_template("page.html").render(
        title="A conversation with VisMem",
        settings={"model": chat.loaded.base, "memory": chat.loaded.checkpoint or "untrained"},
        turns=[turn_context(chat, turn, number) for number, turn in enumerate(over)],
        css=Markup(CSS),
        version=vismem.__version__,
    )


def turn_context(chat: Chat, turn: Turn, number: int) -> dict[str, Any]:
    """A question with its pictures and answers, for the template."""
    settings = {"invocation": policy_label(turn.settings.invocation)}
    if turn.settings.temperature:
        settings |= {"temperature": f"{turn.settings.temperature:g}", "seed": str(turn.settings.seed)}
    return {
        "question": turn.question,
        "settings": settings,
        "pictures": [picture_url(picture) for picture in turn.pictures],
        "answers": [answer_context(chat, turn, number, f"{number}-{i}", reply) for i, reply in enumerate(turn.replies)],
    }


def answer_context(chat: Chat, turn: Turn, number: int, key: str, reply: Reply) -> dict[str, Any]:
    """An answer with its timeline and panels, for the template; `key` is unique on the page."""
    try:
        inspection = chat.inspect(turn, reply.side).result()
    except Exception:  # cancelled, or out of memory: the text is still worth exporting
        inspection = None
    links = None if inspection is None else f"vm-{key}"
    settings = {"notes": ", ".join(facts(turn, reply))}
    if reply.error:
        settings["error"] = reply.error
    name = "without memory" if reply.side == "vanilla" else "with memory"
    strip, panels = "", []
    if inspection is not None:
        strip = timeline(inspection.tokens, inspection.attention, turn=number, side=name, links=links)
        panels = [Markup(panel(inspection, moment.index, key=key)) for moment in inspection.moments]
    return {
        "key": key,
        "name": name,
        "settings": settings,
        "text": Markup(answer_html(reply.pieces, turn=number, side=name, links=links)),
        "timeline": Markup(strip),
        "panels": panels,
    }


def picture_url(picture: Image.Image) -> str:
    """A picture as a data URL, at most `MAX_SIDE` pixels wide and high."""
    copy = to_rgb(picture)
    copy.thumbnail((MAX_SIDE, MAX_SIDE))
    return data_url(copy)
