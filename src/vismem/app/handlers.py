"""What happens when something on the page is used: questions go to the studio, and what is to be shown comes back.

What is shown is made by `rendering.py`, for the components of `page.py`. One visitor is one browser tab, by the session
that gradio gives it; nothing here is kept between two calls but the studio's conversations.
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
from vismem.app.chat import Studio, check_text, read_pictures
from vismem.app.examples import examples
from vismem.app.session import Conversation, Refused, Settings, one_line
from vismem.app.uploads import UNREADABLE

PAUSE = 0.05  # seconds between two looks at an answer that is being written
MOST_SCHEDULE = 2000  # characters
BEAT = 20  # pauses after which it is shown again even if nothing was written
log = logging.getLogger(__name__)
Updates = dict[Any, Any]  # by component


@dataclass(frozen=True, eq=False)
class Parts:
    """The page's components.

    Args:
        bar, past, live, notice, composer, inspector: what changes with a conversation. The latest turn is in `live`, as
            it is sent again with every word; all earlier ones are in `past`.
        switches: what `settings_of` takes, in its order.
    """

    bar: Any
    past: Any
    live: Any
    notice: Any
    composer: Any
    inspector: Any
    switches: list[Any]

    @property
    def outputs(self) -> list[Any]:
        """What changes with a conversation."""
        return [self.bar, self.past, self.live, self.notice, self.composer, self.inspector]


class Handlers:
    """What the page's events call.

    Args:
        studio: what is asked.
        parts: what is shown.
    """

    def __init__(self, studio: Studio, parts: Parts) -> None:
        self.studio, self.parts = studio, parts
        self.reading = asyncio.Lock()  # one question's pictures at a time are in memory without being counted

    # Asking.

    async def submit(self, request: gr.Request, value: dict[str, Any] | None, *said: Any) -> AsyncIterator[Updates]:
        """Asks what was typed, about what was dropped in."""
        value = value or {}
        async for updates in self.put(request, value.get("text") or "", value.get("files") or [], said):
            yield updates

    async def pick(self, request: gr.Request, event: gr.EventData, *said: Any) -> AsyncIterator[Updates]:
        """Asks an example."""
        async for updates in self.put(request, "", [], said, event):
            yield updates

    async def follow(self, request: gr.Request, event: gr.EventData, *said: Any) -> AsyncIterator[Updates]:
        """Asks what was suggested."""
        async for updates in self.put(request, str(told(event, "question")), [], said):
            yield updates

    async def put(
        self,
        request: gr.Request,
        question: str,
        files: list[Any],
        said: tuple[Any, ...],
        picked: gr.EventData | None = None,
    ) -> AsyncIterator[Updates]:
        """Asks, and shows the answer as it grows."""
        parts, conversation = self.parts, self.of(request)
        try:
            settings = settings_of(*said)
            example = None if picked is None else examples()[whole(picked, "example", len(examples()))]
            if example is not None:
                question = example.question
            async with self.reading:
                if example is not None:
                    pictures = example.open()
                else:
                    pictures = await asyncio.to_thread(read_pictures, [named(each) for each in files], conversation)
                turn = await asyncio.to_thread(self.studio.ask, conversation, question, pictures, settings)
        except Refused as error:
            yield {parts.notice: rendering.notice(str(error))}
            return
        except Exception as error:
            log.exception("a question could not be put")
            yield {parts.notice: rendering.notice(f"That went wrong: {one_line(error)}. The terminal has the details.")}
            return
        if example is not None:
            conversation.suggestions = list(example.next)
        elif question in conversation.suggestions:
            conversation.suggestions.remove(question)
        conversation.selected, size, pauses = None, -1, 0
        try:
            yield {**self.all_of(conversation), parts.composer: composing(True, clear=True), parts.inspector: ""}
            while not turn.over and self.current(request, conversation):
                pauses += 1
                if turn.size != size:
                    size = turn.size
                    yield {parts.live: self.shown(conversation)[parts.live]}
                elif pauses % BEAT == 0:  # an older event's answer may have come in between
                    yield self.shown(conversation)
                await asyncio.sleep(PAUSE)
        finally:
            self.studio.stop(turn)  # as when the page was closed
        yield self.all_of(self.of(request))  # as it is now: gradio shows once more what an event showed last

    async def deepen(self, request: gr.Request) -> Updates:
        """Looks into the answer just written, if nobody waits for the model; its timeline shows more then."""
        conversation = self.of(request)
        turn = conversation.turns[-1] if conversation.turns else None
        if turn is None or not turn.main.inspectable or self.studio.worker.rows:
            return {self.parts.live: gr.skip()}
        try:
            await asyncio.shield(asyncio.wrap_future(self.studio.inspect(turn, "memory")))
        except Exception:  # its chips will say so
            log.debug("an answer could not be inspected", exc_info=True)
        still = self.current(request, conversation) and conversation.turns[-1] is turn
        return self.shown(conversation) if still else {self.parts.live: gr.skip()}

    def stop(self, request: gr.Request) -> None:
        """Stops what is being written."""
        conversation = self.of(request)
        if conversation.busy:
            self.studio.stop(conversation.turns[-1])

    def renew(self, request: gr.Request) -> Updates:
        """Begins another conversation."""
        conversation = self.studio.conversation(str(request.session_hash), new=True)
        cleared = {self.parts.composer: composing(False, clear=True), self.parts.inspector: ""}
        return {**self.all_of(conversation), **cleared}

    def leave(self, request: gr.Request) -> None:
        """Forgets a visitor who closed the page."""
        self.studio.leave(str(request.session_hash))

    # Looking into an answer.

    async def inspect(self, request: gr.Request, event: gr.EventData) -> AsyncIterator[Updates]:
        """Opens an invocation's panel, or closes it if it is open."""
        parts, conversation = self.parts, self.of(request)
        try:
            chosen = whole(event, "turn"), str(told(event, "side")), whole(event, "index")
            if conversation.selected == chosen and told(event, "closes"):
                yield self.close(request)
                return
            future = self.studio.inspect(*conversation.invocation(*chosen)[:2])
        except Refused as error:
            yield {parts.notice: rendering.notice(str(error))}
            return
        conversation.selected = chosen
        yield {**self.shown(conversation), parts.inspector: self.panel(conversation)}
        try:
            await asyncio.shield(asyncio.wrap_future(future))
        except Exception:  # the panel says so
            log.exception("an answer could not be inspected")
        conversation = self.of(request)  # another may have been begun, or another panel opened
        yield {**self.shown(conversation), parts.inspector: self.panel(conversation)}

    def close(self, request: gr.Request) -> Updates:
        """Closes the open panel."""
        conversation = self.of(request)
        conversation.selected = None
        return {**self.shown(conversation), self.parts.inspector: ""}

    # What is shown.

    def of(self, request: gr.Request) -> Conversation:
        """The visitor's conversation."""
        return self.studio.conversation(str(request.session_hash))

    def current(self, request: gr.Request, conversation: Conversation) -> bool:
        """Whether the visitor has not begun anew meanwhile, or left."""
        return self.studio.visitors.get(str(request.session_hash)) is conversation

    def all_of(self, conversation: Conversation) -> Updates:
        """The whole page as it is now, without the inspector."""
        return {
            self.parts.bar: rendering.bar(self.studio, conversation),
            **self.shown(conversation),
            self.parts.notice: "",
            self.parts.composer: composing(conversation.busy),
        }

    def shown(self, conversation: Conversation) -> Updates:
        """The conversation as it is now."""
        count = len(conversation.turns)
        return {
            self.parts.past: rendering.turns(conversation, 0, max(count - 1, 0)),
            self.parts.live: rendering.turns(conversation, count - 1, count)
            if count
            else rendering.welcome(self.studio),
        }

    def panel(self, conversation: Conversation) -> str:
        """The open panel as it is now."""
        if conversation.selected is None:
            return ""
        future = conversation.turns[conversation.selected[0]].reply(conversation.selected[1]).inspection
        if future is None or not future.done() or future.cancelled():
            return rendering.inspector(conversation, None)
        error = future.exception()
        if error is not None:
            return rendering.inspector(conversation, None, f"This answer cannot be read again: {one_line(error)}")
        return rendering.inspector(conversation, future.result())


def composing(busy: bool, clear: bool = False) -> Any:
    """The question's box with its button: stop while an answer is written, else ask."""
    more = {"value": {"text": "", "files": []}} if clear else {}
    return gr.update(submit_btn=not busy, stop_btn=busy, **more)


def settings_of(
    compare: bool,
    invocation: str,
    schedule: str,
    rate: float | None,
    where: str | None,
    temperature: float | None,
    seed: float | None,
    most: float | None,
) -> Settings:
    """The switches of the page as settings.

    Raises:
        Refused: if one is empty, or cannot be read.
    """
    for text in (invocation, schedule, where):
        check_text(text or "")
    if len(schedule or "") > MOST_SCHEDULE:
        raise Refused(f"The schedule has {len(schedule):,} characters; {MOST_SCHEDULE:,} is the limit.")
    if invocation == "schedule":
        places = (schedule or "").lower().replace(",", " ").split()
        if not places:
            raise Refused("The schedule is empty: write one such as short@0,long@12.")
        for place in places:
            if not re.fullmatch("(short|long)@[0-9]{1,9}", place):
                rule = "a kind, @, and the token that it comes before, such as short@0,long@12"
                raise Refused(f"The schedule has “{place[:40]}” in it, which cannot be read: write {rule}.")
        invocation = ",".join(places)
    elif invocation == "random":
        if rate is None or where is None:
            raise Refused("Chance and places each need a value: choose them, or let the model decide.")
        invocation = f"random:{rate:g}@{where}"
    if temperature is None or seed is None or most is None:
        raise Refused("Temperature, seed and most tokens each need a number: see Advanced.")
    for name, number in (("seed", seed), ("number of tokens", most)):
        if not float(number).is_integer():
            raise Refused(f"The {name} must be a whole number of 0 or more, not {number:g}.")
    return Settings(invocation, bool(compare), float(temperature), int(seed), int(most))


def told(event: gr.EventData, name: str) -> Any:
    """What an event has under that name, or an empty text where it has nothing, or is no object at all."""
    try:
        return getattr(event, name, "")
    except TypeError:  # gradio looks into whatever the browser sent
        return ""


def whole(event: gr.EventData, name: str, end: int = 2**31) -> int:
    """A number that an event has, from 0 up to `end`, which is not among them. Raises Refused."""
    found = str(told(event, name))
    if not found.isdecimal() or len(found) > 10 or int(found) >= end:
        raise Refused(UNREADABLE)
    return int(found)


def named(file: Any) -> tuple[str, str]:
    """Path and name of an upload."""
    path = file if isinstance(file, str) else file["path"]
    return path, Path(path).name
