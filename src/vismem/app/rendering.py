"""Conversations as HTML for the page: the bar, the welcome, turns with their answers, the inspector's frame.

`panels.py` makes answers, timelines and panels. The CSS classes of these templates begin with `ui-`, and
`static/page.css` styles them. Does not depend on gradio.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from PIL import Image

from vismem.analysis.heatmaps import data_url, enlarged
from vismem.analysis.inspection import Inspection
from vismem.app.examples import examples
from vismem.app.panels import answer_html, environment, panel, timeline
from vismem.app.session import Conversation, Reply, Turn, one_line
from vismem.decoding.markers import SHAPES

if TYPE_CHECKING:
    from vismem.app.chat import Chat

THUMBNAIL = 256  # pixels, longer side: twice its size on the page
POLICY_LABELS = {"learned": "model decides", "off": "no memory", "short": "short only", "long": "long only"}


def static(name: str) -> str:
    """A file in `static/`, as text."""
    return (files("vismem.app") / "static" / name).read_text(encoding="utf-8")


def bar(chat: Chat, conversation: Conversation | None) -> str:
    """The bar: model, export, new conversation, light or dark."""
    loaded = chat.loaded
    started = conversation is not None and any(turn.over for turn in conversation.turns)
    return environment.get_template("bar.html").render(
        base=loaded.base,
        checkpoint=loaded.checkpoint,
        device=str(chat.model.device),
        export=conversation.key if started and conversation is not None else None,
        shapes=SHAPES,
    )


def advanced() -> str:
    """The button that shows the advanced settings."""
    return environment.get_template("advanced.html").render()


def welcome(chat: Chat) -> str:
    """Shown until the first question: what this is, and examples."""
    pocket = chat.loaded.base == "pocket"
    cards = [
        {"example": each, "index": index, "url": thumbnail(each.open()[0]) if each.picture else None}
        for index, each in enumerate(examples())
    ]
    return environment.get_template("welcome.html").render(cards=cards if pocket else [], pocket=pocket, shapes=SHAPES)


def turn_html(conversation: Conversation, number: int) -> str:
    """One turn: the question with its pictures, each answer with its timeline, and suggestions."""
    turn = conversation.turns[number]
    latest = number == len(conversation.turns) - 1
    if len(turn.thumbnails) < len(turn.pictures):  # made once: a turn is rendered again with every token
        turn.thumbnails = [thumbnail(picture) for picture in turn.pictures]
    return environment.get_template("turn.html").render(
        turn=turn,
        number=number,
        pictures=turn.thumbnails,
        answers=[answer(conversation, turn, number, reply) for reply in turn.replies],
        suggestions=conversation.suggestions if latest and turn.over else [],
        comparison=comparison(turn),
    )


def answer(conversation: Conversation, turn: Turn, number: int, reply: Reply) -> dict[str, Any]:
    """One answer, for the template."""
    selected = None
    if conversation.selected is not None and conversation.selected[:2] == (number, reply.side):
        selected = conversation.selected[2]
    over, strip = reply.over.is_set(), ""
    if over and reply.tokens:
        found = reply.inspected
        attention = found.attention if isinstance(found, Inspection) else None
        strip = timeline(reply.tokens, attention, turn=number, side=reply.side, selected=selected)
    return {
        "side": reply.side,
        "policy": "no memory" if reply.side == "vanilla" else policy_label(turn.settings.invocation),
        "html": answer_html(reply.pieces, turn=number, side=reply.side, selected=selected, writing=not over),
        "strip": strip,
        "facts": facts(turn, reply) if over else [],
        "error": reply.error,
        "over": over,
    }


def policy_label(invocation: str) -> str:
    """An invocation policy in words."""
    if invocation.startswith("random:"):
        rate, _, where = invocation.removeprefix("random:").partition("@")
        return f"at random, {rate} {'before any token' if where == 'anywhere' else 'after each phrase'}"
    return POLICY_LABELS.get(invocation, invocation.replace(",", ", "))


def facts(turn: Turn, reply: Reply) -> list[str]:
    """The line under an answer, in parts."""
    found = [] if reply.finish == "error" else [f"{reply.sampled} token{'s' * (reply.sampled != 1)}"]
    if reply.seconds and reply.finish != "error":
        found.append(f"{reply.seconds:.2f} s")
    if turn.settings.temperature:
        found.append(f"temperature {turn.settings.temperature:g}, seed {turn.settings.seed}")
    if reply.finish == "length":
        found.append("cut off at max tokens")
    if reply.finish == "cancelled":
        found.append("stopped")
    if reply is turn.main and turn.unreached:
        found.append(f"{turn.unreached} scheduled after the answer's end, so not reached")
    if any(invocation.length == 0 for invocation in reply.invocations):
        found.append("a disabled kind formed nothing")
    return found


def comparison(turn: Turn) -> str | None:
    """Whether two answers side by side have the same words, once both are finished."""
    if len(turn.replies) < 2 or not turn.over or any(reply.finish == "error" for reply in turn.replies):
        return None
    # An invocation may replace a colon.
    first, second = (reply.text.replace(":", " ").split() for reply in turn.replies)
    return "The answers are the same." if first == second else "The answers differ."


def inspector(conversation: Conversation) -> str:
    """The selected invocation's panel in its frame, or an empty string."""
    if conversation.selected is None:
        return ""
    number, side, index = conversation.selected
    reply = conversation.turns[number].reply(side)
    found = reply.inspected
    return environment.get_template("inspector.html").render(
        number=number,
        side=side,
        index=index,
        count=len(reply.invocations),
        panel=panel(found, index, key=f"{number}-{side}") if isinstance(found, Inspection) else "",
        note=f"Cannot inspect this answer: {one_line(found)}" if isinstance(found, BaseException) else "",
    )


def notice(message: str) -> str:
    """An error in one line."""
    return environment.get_template("notice.html").render(message=message)


def thumbnail(picture: Image.Image) -> str:
    """A small copy as a data URL."""
    return data_url(enlarged(picture.reduce(max(max(picture.size) // (4 * THUMBNAIL), 1)), THUMBNAIL))
