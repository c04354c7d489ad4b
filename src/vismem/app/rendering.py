"""Conversations as HTML for the page: the bar above, the welcome, turns with their answers, the inspector's frame.

Answers, timelines and panels are `panels.py`'s; the templates' own classes begin with `ui-`, and `static/page.css` has
their looks. Nothing here knows gradio.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from PIL import Image

from vismem.analysis.findings import Inspection
from vismem.analysis.heatmaps import enlarged
from vismem.app.chat import Studio
from vismem.app.examples import examples
from vismem.app.maps import data_url
from vismem.app.panels import answer_html, environment, panel, timeline
from vismem.app.session import Conversation, Reply, Turn
from vismem.decoding.markers import SHAPES

THUMBNAIL = 256  # pixels of a picture's longer side; it is shown at half of that
WHO = {"learned": "model decides", "off": "no memory", "short": "only short forms", "long": "only long forms"}


def static(name: str) -> str:
    """The text of a file of the page."""
    return (files("vismem.app") / "static" / name).read_text(encoding="utf-8")


def bar(studio: Studio, conversation: Conversation | None) -> str:
    """What stands above everything: name, model, export, new conversation, light and dark."""
    loaded = studio.loaded
    begun = conversation is not None and any(turn.over for turn in conversation.turns)
    return environment.get_template("bar.html").render(
        base=loaded.base,
        checkpoint=loaded.checkpoint,
        device=str(studio.model.device),
        export=conversation.key if begun and conversation is not None else None,
        shapes=SHAPES,
    )


def advanced() -> str:
    """The button that shows the settings few need."""
    return environment.get_template("advanced.html").render()


def welcome(studio: Studio) -> str:
    """What stands where the conversation will be."""
    pocket = studio.loaded.base == "pocket"
    cards = [
        {"example": each, "index": index, "url": thumbnail(each.open()[0]) if each.picture else None}
        for index, each in enumerate(examples())
    ]
    return environment.get_template("welcome.html").render(cards=cards if pocket else [], pocket=pocket, shapes=SHAPES)


def turns(conversation: Conversation, first: int, last: int) -> str:
    """The turns from `first` up to `last`, which is not among them, as HTML."""
    return "".join(turn_html(conversation, number) for number in range(first, last))


def turn_html(conversation: Conversation, number: int) -> str:
    """One turn: the question with its pictures, each answer with its timeline, and what to ask next."""
    turn = conversation.turns[number]
    latest = number == len(conversation.turns) - 1
    if len(turn.thumbnails) < len(turn.pictures):  # made once: a turn is drawn again with every word
        turn.thumbnails = [thumbnail(picture) for picture in turn.pictures]
    return environment.get_template("turn.html").render(
        turn=turn,
        number=number,
        pictures=turn.thumbnails,
        answers=[answer(conversation, turn, number, reply) for reply in turn.replies],
        suggestions=conversation.suggestions if latest and turn.over else [],
        differ=differ(turn),
    )


def answer(conversation: Conversation, turn: Turn, number: int, reply: Reply) -> dict[str, Any]:
    """What the template needs of one answer."""
    selected = None
    if conversation.selected is not None and conversation.selected[:2] == (number, reply.side):
        selected = conversation.selected[2]
    over = reply.over.is_set()
    strip = ""
    if over and reply.strip:
        attention = None
        if reply.inspection is not None and reply.inspection.done() and not reply.inspection.cancelled():
            attention = None if reply.inspection.exception() else reply.inspection.result().attention
        strip = timeline(reply.strip, attention, turn=number, side=reply.side, selected=selected)
    return {
        "side": reply.side,
        "who": "no memory" if reply.side == "vanilla" else who(turn.settings.invocation),
        "html": answer_html(reply.pieces, turn=number, side=reply.side, selected=selected, writing=not over),
        "strip": strip,
        "facts": facts(turn, reply) if over else [],
        "trouble": reply.trouble,
        "over": over,
    }


def who(invocation: str) -> str:
    """Who invoked memory, in words."""
    if invocation.startswith("random:"):
        rate, _, where = invocation.removeprefix("random:").partition("@")
        return f"by chance, {rate} {'before any token' if where == 'anywhere' else 'after each phrase'}"
    return WHO.get(invocation, invocation.replace(",", ", "))


def facts(turn: Turn, reply: Reply) -> list[str]:
    """What the line under an answer says."""
    found = [] if reply.finish == "error" else [f"{reply.sampled} token{'s' * (reply.sampled != 1)}"]
    if reply.seconds and reply.finish != "error":
        found.append(f"{reply.seconds:.2f} s")
    if turn.settings.temperature:
        found.append(f"temperature {turn.settings.temperature:g}, seed {turn.settings.seed}")
    if reply.finish == "length":
        found.append("cut off at the most tokens allowed")
    if reply.finish == "cancelled":
        found.append("stopped")
    if reply is turn.main and turn.unreached:
        found.append(f"{turn.unreached} scheduled after the answer's end, so not reached")
    if any(one.length == 0 for one in reply.invocations):
        found.append("a kind that is switched off formed nothing")
    return found


def differ(turn: Turn) -> str | None:
    """Whether two answers side by side say the same, once both are written."""
    if len(turn.replies) < 2 or not turn.over or any(reply.finish == "error" for reply in turn.replies):
        return None
    first, second = (letters(reply.text) for reply in turn.replies)
    return "Both say the same." if first == second else "The answers differ."


def letters(text: str) -> list[str]:
    """A text's words without what an invocation may stand in the place of."""
    return text.replace(":", " ").split()


def inspector(conversation: Conversation, found: Inspection | None, note: str = "") -> str:
    """The selected invocation's panel with its frame; nothing where none is selected.

    Args:
        found: the answer's inspection; None while it is being made.
        note: what to say in its place.
    """
    if conversation.selected is None:
        return ""
    number, side, index = conversation.selected
    count = len(conversation.turns[number].reply(side).invocations)
    return environment.get_template("inspector.html").render(
        number=number,
        side=side,
        index=index,
        count=count,
        panel="" if found is None else panel(found, index, key=f"{number}-{side}"),
        note=note,
    )


def notice(message: str) -> str:
    """One line about what went wrong; nothing for no message."""
    return environment.get_template("notice.html").render(message=message) if message else ""


def thumbnail(picture: Image.Image) -> str:
    """A small copy as an address that the page holds itself."""
    return data_url(enlarged(picture.reduce(max(max(picture.size) // (4 * THUMBNAIL), 1)), THUMBNAIL))
