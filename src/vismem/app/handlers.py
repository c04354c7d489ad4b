"""The page's event handlers: they pass questions to the chat and return updates for the components.

`rendering.py` makes the HTML, `page.py` the components. A visitor is one browser tab, identified by gradio's session
hash; handlers keep no state between calls, the chat's conversations do.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from vismem.app import rendering
from vismem.app.chat import Chat, check_text, read_pictures
from vismem.app.examples import examples
from vismem.app.guards import INVALID_EVENT
from vismem.app.session import AnswerSettings, ChatError, Conversation, one_line

POLL_INTERVAL = 0.05  # seconds between two checks of a running answer
REFRESH_EVERY = 20  # polls without a new token after which the conversation is sent again
MAX_SCHEDULE = 2000  # characters
log = logging.getLogger(__name__)
Updates = dict[Any, Any]  # by component


@dataclass(frozen=True, eq=False)
class Components:
    """The page's components that a conversation updates, and its switches."""

    bar: Any
    past: Any  # all turns but the latest
    live: Any  # the latest turn, which is sent again with every token
    notice: Any
    composer: Any
    inspector: Any
    switches: list[Any]  # the inputs of `settings_of`, in order

    @property
    def outputs(self) -> list[Any]:
        return [self.bar, self.past, self.live, self.notice, self.composer, self.inspector]


class Handlers:
    """Callbacks for the page's events; `parts` are the components to update."""

    def __init__(self, chat: Chat, parts: Components) -> None:
        self.chat, self.parts = chat, parts
        self.read_lock = asyncio.Lock()  # bounds memory: pictures being read count towards no limit yet

    # Asking.

    async def submit(self, request: gr.Request, value: dict[str, Any] | None, *switches: Any) -> AsyncIterator[Updates]:
        """Asks what was typed, about the uploaded images."""
        value = value or {}
        async for updates in self.ask(request, value.get("text") or "", value.get("files") or [], switches):
            yield updates

    async def pick(self, request: gr.Request, event: gr.EventData, *switches: Any) -> AsyncIterator[Updates]:
        """Asks an example."""
        async for updates in self.ask(request, "", [], switches, event):
            yield updates

    async def follow(self, request: gr.Request, event: gr.EventData, *switches: Any) -> AsyncIterator[Updates]:
        """Asks a suggested question."""
        async for updates in self.ask(request, str(event_value(event, "question")), [], switches):
            yield updates

    async def ask(
        self,
        request: gr.Request,
        question: str,
        files: list[Any],
        switches: tuple[Any, ...],
        picked: gr.EventData | None = None,
    ) -> AsyncIterator[Updates]:
        """Asks, and streams the answer."""
        parts, conversation = self.parts, self.conversation(request)
        try:
            settings = settings_of(*switches)
            example = None if picked is None else examples()[event_index(picked, "example", len(examples()))]
            async with self.read_lock:
                if example is not None:
                    question, pictures = example.question, example.open()
                else:
                    paths = [Path(file if isinstance(file, str) else file["path"]) for file in files]
                    pictures = await asyncio.to_thread(read_pictures, paths, conversation)
                turn = await asyncio.to_thread(self.chat.ask, conversation, question, pictures, settings)
        except ChatError as error:
            yield {parts.notice: rendering.notice(str(error))}
            return
        except Exception as error:
            log.exception("cannot ask a question")
            message = f"Something went wrong: {one_line(error)}. See the terminal for details."
            yield {parts.notice: rendering.notice(message)}
            return
        if example is not None:
            conversation.suggestions = list(example.next)
        elif question in conversation.suggestions:
            conversation.suggestions.remove(question)
        conversation.selected, size, polls = None, -1, 0
        try:
            cleared = {parts.composer: composer_update(busy=True, clear=True), parts.inspector: ""}
            yield {**self.page_updates(conversation), **cleared}
            while not turn.over and self.is_current(request, conversation):
                polls += 1
                if turn.size != size:
                    size = turn.size
                    yield {parts.live: rendering.turn_html(conversation, len(conversation.turns) - 1)}
                elif polls % REFRESH_EVERY == 0:  # an older event may have overwritten it
                    yield self.turn_updates(conversation)
                await asyncio.sleep(POLL_INTERVAL)
        finally:
            self.chat.stop(turn)  # the page may have been closed
        yield self.page_updates(self.conversation(request))  # gradio repeats an event's last update when it ends

    async def inspect_latest(self, request: gr.Request) -> Updates:
        """Inspects the answer just written, unless somebody waits for the model; its timeline then shows attention."""
        conversation = self.conversation(request)
        turn = conversation.turns[-1] if conversation.turns else None
        if turn is None or not turn.main.inspectable or self.chat.worker.rows:
            return {self.parts.live: gr.skip()}
        try:
            await asyncio.shield(asyncio.wrap_future(self.chat.inspect(turn, "memory")))
        except Exception:  # shown when a chip is clicked
            log.debug("cannot inspect an answer", exc_info=True)
        latest = self.is_current(request, conversation) and conversation.turns[-1] is turn
        return self.turn_updates(conversation) if latest else {self.parts.live: gr.skip()}

    def stop(self, request: gr.Request) -> None:
        """Stops the running answer."""
        conversation = self.conversation(request)
        if conversation.busy:
            self.chat.stop(conversation.turns[-1])

    def renew(self, request: gr.Request) -> Updates:
        """Starts a new conversation."""
        conversation = self.chat.conversation(str(request.session_hash), new=True)
        cleared = {self.parts.composer: composer_update(busy=False, clear=True), self.parts.inspector: ""}
        return {**self.page_updates(conversation), **cleared}

    def leave(self, request: gr.Request) -> None:
        """Drops the conversation of a visitor who closed the page."""
        self.chat.leave(str(request.session_hash))

    # Inspecting an answer.

    async def inspect(self, request: gr.Request, event: gr.EventData) -> AsyncIterator[Updates]:
        """Opens an invocation's panel, or closes it if it is open."""
        parts, conversation = self.parts, self.conversation(request)
        try:
            number, side = event_index(event, "turn"), str(event_value(event, "side"))
            index = event_index(event, "index")
            if conversation.selected == (number, side, index) and event_value(event, "closes"):
                yield self.close(request)
                return
            future = self.chat.inspect(conversation.turn_with(number, side, index), side)
        except ChatError as error:
            yield {parts.notice: rendering.notice(str(error))}
            return
        conversation.selected = number, side, index
        yield {**self.turn_updates(conversation), parts.inspector: rendering.inspector(conversation)}
        try:
            await asyncio.shield(asyncio.wrap_future(future))
        except Exception:  # the panel shows it
            log.exception("cannot inspect an answer")
        conversation = self.conversation(request)  # a new one may have been started, or another panel opened
        yield {**self.turn_updates(conversation), parts.inspector: rendering.inspector(conversation)}

    def close(self, request: gr.Request) -> Updates:
        """Closes the open panel."""
        conversation = self.conversation(request)
        conversation.selected = None
        return {**self.turn_updates(conversation), self.parts.inspector: ""}

    # Updates.

    def conversation(self, request: gr.Request) -> Conversation:
        """The visitor's conversation."""
        return self.chat.conversation(str(request.session_hash))

    def is_current(self, request: gr.Request, conversation: Conversation) -> bool:
        """Whether this is still the visitor's conversation."""
        return self.chat.visitors.get(str(request.session_hash)) is conversation

    def page_updates(self, conversation: Conversation) -> Updates:
        """All components except the inspector."""
        return {
            self.parts.bar: rendering.bar(self.chat, conversation),
            **self.turn_updates(conversation),
            self.parts.notice: "",
            self.parts.composer: composer_update(busy=conversation.busy),
        }

    def turn_updates(self, conversation: Conversation) -> Updates:
        """The turns, or the welcome."""
        *past, latest = [rendering.turn_html(conversation, number) for number in range(len(conversation.turns))] or [
            rendering.welcome(self.chat)
        ]
        return {self.parts.past: "".join(past), self.parts.live: latest}


def composer_update(*, busy: bool, clear: bool = False) -> Any:
    """The question box, with a stop button while an answer is written and a submit button otherwise."""
    more = {"value": {"text": "", "files": []}} if clear else {}
    return gr.update(submit_btn=not busy, stop_btn=busy, **more)


def settings_of(
    compare: object,
    invocation: str,
    schedule: str,
    rate: float | None,
    where: str | None,
    temperature: float | None,
    seed: float | None,
    max_tokens: float | None,
) -> AnswerSettings:
    """Reads the page's switches. Raises ChatError if one is empty or invalid."""
    for text in (invocation, schedule, where):
        check_text(text or "")
    if len(schedule or "") > MAX_SCHEDULE:
        raise ChatError(f"The schedule has {len(schedule):,} characters; the limit is {MAX_SCHEDULE:,}.")
    if invocation == "schedule":
        steps = (schedule or "").lower().replace(",", " ").split()
        if not steps:
            raise ChatError("The schedule is empty: write one such as short@0,long@12.")
        for step in steps:
            if not re.fullmatch("(short|long)@[0-9]{1,9}", step):
                rule = "a kind, @, and the token it comes before, such as short@0,long@12"
                raise ChatError(f"Cannot parse “{step[:40]}” in the schedule: write {rule}.")
        invocation = ",".join(steps)
    elif invocation == "random":
        if rate is None or where is None:
            raise ChatError("Probability and places each need a value: set them, or let the model decide.")
        invocation = f"random:{rate:g}@{where}"
    if temperature is None or seed is None or max_tokens is None:
        raise ChatError("Temperature, seed and max tokens each need a number: see Advanced.")
    for name, number in (("seed", seed), ("number of tokens", max_tokens)):
        if not float(number).is_integer():
            raise ChatError(f"The {name} must be a whole number, 0 or more, not {number:g}.")
    return AnswerSettings(invocation, bool(compare), float(temperature), int(seed), int(max_tokens))


def event_value(event: gr.EventData, name: str) -> Any:
    """A value that the browser sent with an event; an empty string if it is missing."""
    try:
        return getattr(event, name, "")
    except TypeError:  # the browser sent no object
        return ""


def event_index(event: gr.EventData, name: str, end: int = 2**31) -> int:
    """An integer in [0, end) that the browser sent with an event. Raises ChatError."""
    value = str(event_value(event, name))
    if not value.isdecimal() or len(value) > 10 or int(value) >= end:
        raise ChatError(INVALID_EVENT)
    return int(value)
