"""A visitor's conversation as the one HTML file that `export.py` writes: every answer inspected, every panel in it."""

from __future__ import annotations

from vismem.app import export
from vismem.app.chat import Studio
from vismem.app.rendering import facts, who
from vismem.app.session import Conversation, Reply, Turn


def exported(studio: Studio, conversation: Conversation) -> str:
    """The conversation as a page. Waits until all its answers are inspected; an unfinished turn is left out."""
    model = {"model": studio.loaded.base, "memory": studio.loaded.checkpoint or "untrained"}
    done = [turn for turn in conversation.turns if turn.over]
    return export.page(
        export.Conversation([shared(studio, turn) for turn in done], title="A conversation with VisMem", settings=model)
    )


def shared(studio: Studio, turn: Turn) -> export.Turn:
    """One turn."""
    settings = {"invocation": who(turn.settings.invocation)}
    if turn.settings.temperature:
        settings |= {"temperature": f"{turn.settings.temperature:g}", "seed": str(turn.settings.seed)}
    return export.Turn(turn.question, [answer(studio, turn, reply) for reply in turn.replies], turn.pictures, settings)


def answer(studio: Studio, turn: Turn, reply: Reply) -> export.Reply:
    """One answer; without panels where it cannot be inspected."""
    try:
        inspection = studio.inspect(turn, reply.side).result()
    except Exception:  # an answer that was given up, or that there is no memory left for: its words are still good
        inspection = None
    name = "without memory" if reply.side == "vanilla" else "with memory"
    said = {"notes": ", ".join(facts(turn, reply))}
    if reply.trouble:
        said["trouble"] = reply.trouble
    return export.Reply(name, reply.pieces, inspection, said)
