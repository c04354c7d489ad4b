"""What the viewer does with an answer that nobody waits for, that was stopped, or that is still being written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the viewer's extra is not installed")

import gradio as gr

from vismem.app import rendering
from vismem.app.chat import Studio
from vismem.app.examples import examples
from vismem.app.handlers import Handlers, Parts
from vismem.app.session import Conversation, Settings
from vismem.app.sharing import exported
from vismem.loading import load_model

BOUND = 60  # seconds after which a test gives up
BOTH = examples()[1]  # invokes short, then long
SAID = (False, "learned", "", 0.25, "anywhere", 0, 0, 64)  # the page's switches as they are at first


@pytest.fixture(scope="module")
def studio():
    made = Studio(load_model(device="cpu"), batch_size=4, most_waiting=4)
    yield made
    made.close()


@pytest.fixture
def handlers(studio):
    """The page's, by the names of its parts."""
    return Handlers(studio, Parts("bar", "past", "live", "notice", "composer", "inspector", []))


@pytest.fixture
def visitor(studio):
    """A request of somebody's, who leaves in the end."""
    yield SimpleNamespace(session_hash="somebody")
    studio.leave("somebody")


@contextmanager
def holding(studio) -> Iterator[None]:
    """Keeps the worker from writing."""
    gate = threading.Event()
    studio.worker.call(gate.wait, BOUND)
    try:
        yield
    finally:
        gate.set()


def answered(studio, conversation, question, pictures=(), settings=None):
    turn = studio.ask(conversation, question, pictures, settings)
    assert all(reply.over.wait(BOUND) for reply in turn.replies)
    return turn


def test_an_answer_is_given_up_where_the_page_is_closed(studio, handlers, visitor):
    async def leave() -> None:
        async with aclosing(handlers.put(visitor, "Hello.", [], SAID)) as updates:
            assert (await anext(updates))["inspector"] == ""

    with holding(studio):
        asyncio.run(leave())
        (turn,) = handlers.of(visitor).turns
        assert not turn.over
    assert turn.main.over.wait(BOUND) and turn.main.finish == "cancelled"


def test_an_answer_is_looked_into_unasked_where_nobody_waits(studio, handlers, visitor):
    async def at_once() -> dict:
        looked = asyncio.ensure_future(handlers.deepen(visitor))
        await asyncio.sleep(0)
        assert looked.done(), "it waits for the model"
        return looked.result()

    turn = answered(studio, handlers.of(visitor), BOTH.question, BOTH.open())
    with holding(studio):
        other = studio.ask(Conversation(), "Hello.")
        assert asyncio.run(at_once()) == {"live": gr.skip()} and turn.main.inspection is None
    assert other.main.over.wait(BOUND)
    before = handlers.shown(handlers.of(visitor))["live"]
    found = asyncio.run(handlers.deepen(visitor))
    assert turn.main.inspection.done() and len(found["live"]) > len(before)  # each word with what it gave to memory


def test_what_was_stopped_did_not_miss_its_schedule(studio):
    conversation = Conversation()
    with holding(studio):
        turn = studio.ask(conversation, "Hello.", (), Settings("long@0,long@9"))
        assert turn.unreached == 0  # there may be more to come
        studio.stop(turn)
    assert turn.main.over.wait(BOUND) and turn.main.finish == "cancelled" and turn.unreached == 0
    html = rendering.turn_html(conversation, 0)
    assert "stopped" in html and "not reached" not in html


def test_the_side_without_memory_has_no_schedule(studio):
    settings = Settings("long@0,long@99", compare=True, max_new_tokens=5)
    turn = answered(studio, Conversation(), "Hello.", (), settings)
    late = "1 scheduled after the answer's end, so not reached"
    assert late in rendering.facts(turn, turn.main) and late not in rendering.facts(turn, turn.reply("vanilla"))


def test_an_export_leaves_out_what_is_not_written_yet(studio):
    conversation = Conversation()
    answered(studio, conversation, "What is first?", (), Settings("off"))
    with holding(studio):
        turn = studio.ask(conversation, "What is second?")
        html = exported(studio, conversation)
        assert "What is first?" in html and "What is second?" not in html
    assert turn.main.over.wait(BOUND)
    assert "What is second?" in exported(studio, conversation)
