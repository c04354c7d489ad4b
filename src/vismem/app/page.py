"""The page in the browser: gradio's components, and what happens when they are used.

What is asked goes to `studio.py`, what is shown comes from `rendering.py`. The looks and the web application are
`web.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from vismem.app import rendering
from vismem.app.examples import examples
from vismem.app.session import MOST_TOKENS, Conversation, Refused, Settings, one_line
from vismem.app.studio import Studio, read_picture

PAUSE = 0.05  # seconds between two looks at an answer that is being written
KEPT = 3600  # seconds that uploads are kept
CHOICES = [
    ("Model decides", "learned"),
    ("Off", "off"),
    ("◆ Short only", "short"),
    ("● Long only", "long"),
    ("Schedule", "schedule"),
    ("Random", "random"),
]
log = logging.getLogger(__name__)
Updates = dict[Any, Any]


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    watch = {"js_on_load": rendering.static("talk.js"), "apply_default_css": False}
    quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    with gr.Blocks(analytics_enabled=False, title="VisMem", fill_width=True, delete_cache=(KEPT, KEPT)) as page:
        bar = gr.HTML(
            rendering.bar(studio, None), elem_id="ui-bar", **{**watch, "js_on_load": rendering.static("bar.js")}
        )
        with gr.Row(elem_id="ui-main"):
            with gr.Column(elem_id="ui-left"):
                past = gr.HTML("", elem_id="ui-past", **watch)
                live = gr.HTML(rendering.welcome(studio), elem_id="ui-live", **watch)
                with gr.Column(elem_id="ui-dock"):
                    notice = gr.HTML("", elem_id="ui-note", **watch)
                    composer = gr.MultimodalTextbox(
                        file_count="multiple",
                        file_types=["image"],
                        placeholder="Ask about your images…",
                        show_label=False,
                        label="Question and images",
                        container=False,
                        max_plain_text_length=1_000_000,
                        elem_id="ui-composer",
                    )
                    with gr.Row(elem_id="ui-switches"):
                        compare = gr.Checkbox(label="Compare", elem_id="ui-compare", container=False)
                        invocation = gr.Radio(
                            CHOICES,
                            value="learned",
                            label="Who invokes memory",
                            elem_id="ui-invocation",
                            container=False,
                        )
                    with gr.Row(elem_id="ui-schedule", visible=False) as scheduling:
                        schedule = gr.Textbox(
                            "short@0,long@12",
                            label="Schedule: kind@token, comma between",
                            max_lines=1,
                            elem_id="ui-plan",
                        )
                    with gr.Row(elem_id="ui-random", visible=False) as chance:
                        rate = gr.Slider(0, 1, 0.2, step=0.05, label="Chance at each place")
                        where = gr.Radio(
                            [("after each phrase", "delimiter"), ("before any token", "anywhere")],
                            value="delimiter",
                            label="Places",
                        )
                    with gr.Accordion("Advanced", open=False, elem_id="ui-advanced"), gr.Row():
                        temperature = gr.Slider(
                            0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token"
                        )
                        seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="of sampling and of chance")
                        most = gr.Slider(1, MOST_TOKENS, 256, step=1, label="Most tokens", info="of an answer")
            inspector = gr.HTML("", elem_id="ui-right", **{**watch, "js_on_load": rendering.static("inspector.js")})
        switches = [compare, invocation, schedule, rate, where, temperature, seed, most]
        outputs = [bar, past, live, notice, composer, inspector]

        def all_of(conversation: Conversation, message: str = "") -> Updates:
            """The whole page as it is now; the latest turn is apart, as it is sent again with every word."""
            count = len(conversation.turns)
            return {
                bar: rendering.bar(studio, conversation),
                past: rendering.turns(conversation, 0, count - 1) if count else "",
                live: rendering.turns(conversation, count - 1, count) if count else rendering.welcome(studio),
                notice: rendering.notice(message),
                composer: gr.update(submit_btn=not conversation.busy, stop_btn=conversation.busy),
            }

        async def put(
            request: gr.Request, question: str, files: list[Any], said: list[Any], example: int | None = None
        ) -> AsyncIterator[Updates]:
            """Asks, and shows the answer as it grows."""
            conversation = studio.conversation(str(request.session_hash))
            try:
                settings = settings_of(*said)
                if example is not None:
                    pictures = examples()[example].open()
                else:
                    pictures = [await asyncio.to_thread(read_picture, *named(each)) for each in files]
                turn = await asyncio.to_thread(studio.ask, conversation, question, pictures, settings)
            except Refused as error:
                yield {notice: rendering.notice(str(error))}
                return
            except Exception as error:
                log.exception("a question could not be put")
                yield {notice: rendering.notice(f"That went wrong: {one_line(error)}. The terminal has the details.")}
                return
            if example is not None:
                conversation.suggestions = list(examples()[example].next)
            elif question in conversation.suggestions:
                conversation.suggestions.remove(question)
            try:
                conversation.selected = None
                yield {**all_of(conversation), composer: composing(True, clear=True), inspector: ""}
                size = -1
                while not turn.over:
                    if turn.size != size:
                        size = turn.size
                        yield {
                            live: rendering.turns(conversation, len(conversation.turns) - 1, len(conversation.turns))
                        }
                    await asyncio.sleep(PAUSE)
            finally:
                studio.stop(turn)  # as when the page was closed
            if studio.visitors.get(str(request.session_hash)) is conversation:  # and not begun anew meanwhile
                yield all_of(conversation)

        def composing(busy: bool, clear: bool = False) -> Any:
            more = {"value": {"text": "", "files": []}} if clear else {}
            return gr.update(submit_btn=not busy, stop_btn=busy, **more)

        async def submit(request: gr.Request, value: dict[str, Any] | None, *said: Any) -> AsyncIterator[Updates]:
            value = value or {}
            async for updates in put(request, value.get("text") or "", value.get("files") or [], list(said)):
                yield updates

        async def pick(request: gr.Request, event: gr.EventData, *said: Any) -> AsyncIterator[Updates]:
            index = int(event.example)
            async for updates in put(request, examples()[index].question, [], list(said), index):
                yield updates

        async def follow(request: gr.Request, event: gr.EventData, *said: Any) -> AsyncIterator[Updates]:
            async for updates in put(request, str(event.question), [], list(said)):
                yield updates

        def stop(request: gr.Request) -> None:
            conversation = studio.conversation(str(request.session_hash))
            if conversation.busy:
                studio.stop(conversation.turns[-1])

        def renew(request: gr.Request) -> Updates:
            conversation = studio.conversation(str(request.session_hash), new=True)
            return {**all_of(conversation), composer: composing(False, clear=True), inspector: ""}

        async def inspect(request: gr.Request, event: gr.EventData) -> AsyncIterator[Updates]:
            """Opens an invocation's panel, or closes it if it is open."""
            conversation = studio.conversation(str(request.session_hash))
            chosen = (int(event.turn), str(event.side), int(event.index))
            if conversation.selected == chosen and event.closes:
                conversation.selected = None
                yield {**shown(conversation), inspector: ""}
                return
            found, note = None, ""
            try:
                turn = conversation.turns[chosen[0]]
                future = studio.inspect(turn, chosen[1])
                if not 0 <= chosen[2] < len(turn.reply(chosen[1]).invocations):
                    return
                conversation.selected = chosen
                yield {**shown(conversation), inspector: rendering.inspector(conversation, None)}
                found = await asyncio.shield(asyncio.wrap_future(future))
            except (Refused, IndexError) as error:
                yield {notice: rendering.notice(str(error) if isinstance(error, Refused) else "That turn is gone.")}
                return
            except Exception as error:
                log.exception("an answer could not be inspected")
                note = f"This answer cannot be read again: {one_line(error)}"
            if conversation.selected == chosen:
                yield {**shown(conversation), inspector: rendering.inspector(conversation, found, note)}

        def shown(conversation: Conversation) -> Updates:
            return {key: value for key, value in all_of(conversation).items() if key in (past, live)}

        def close(request: gr.Request) -> Updates:
            conversation = studio.conversation(str(request.session_hash))
            conversation.selected = None
            return {**shown(conversation), inspector: ""}

        def switched(choice: str) -> tuple[Any, Any]:
            return gr.update(visible=choice == "schedule"), gr.update(visible=choice == "random")

        def leave(request: gr.Request) -> None:
            studio.leave(str(request.session_hash))

        composer.submit(submit, [composer, *switches], outputs, **quiet)
        composer.stop(stop, None, None, **quiet)
        for talk in (past, live):
            talk.example(pick, switches, outputs, **quiet)
            talk.follow(follow, switches, outputs, **quiet)
            talk.inspect(inspect, None, outputs, trigger_mode="multiple", **quiet)
        inspector.inspect(inspect, None, outputs, trigger_mode="multiple", **quiet)
        inspector.closing(close, None, outputs, **quiet)
        notice.dismiss(lambda: "", None, notice, **quiet)
        bar.renew(renew, None, outputs, **quiet)
        invocation.change(switched, invocation, [scheduling, chance], **quiet)
        page.unload(leave)
    return page


def settings_of(
    compare: bool,
    invocation: str,
    schedule: str,
    rate: float,
    where: str,
    temperature: float | None,
    seed: float | None,
    most: float | None,
) -> Settings:
    """The switches of the page as settings.

    Raises:
        Refused: if one is empty.
    """
    if invocation == "schedule":
        invocation = "".join((schedule or "").split())
        if not invocation:
            raise Refused("The schedule is empty: write one such as short@0,long@12.")
    elif invocation == "random":
        invocation = f"random:{rate:g}@{where}"
    if temperature is None or seed is None or most is None:
        raise Refused("Temperature, seed and most tokens each need a number: see Advanced.")
    return Settings(invocation, bool(compare), float(temperature), int(seed), int(most))


def named(file: Any) -> tuple[str, str]:
    """Path and name of an upload."""
    path = file if isinstance(file, str) else file["path"]
    return path, Path(path).name
