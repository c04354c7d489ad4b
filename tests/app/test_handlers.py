"""The page's handlers with answers that are abandoned, stopped or still being written."""

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
from vismem.app.chat import Chat
from vismem.app.examples import examples
from vismem.app.export import exported
from vismem.app.handlers import Components, Handlers
from vismem.app.session import AnswerSettings, Conversation
from vismem.loading import load_model

BOUND = 60  # seconds after which a test gives up
BOTH = examples()[1]  # invokes short, then long
SWITCHES = (False, "learned", "", 0.25, "anywhere", 0, 0, 64)  # the page's switches at their defaults


@pytest.fixture(scope="module")
def chat():
    made = Chat(load_model(device="cpu"), batch_size=4, max_waiting=4)
    yield made
    made.close()


@pytest.fixture
def handlers(chat):
    """Handlers whose components are their names."""
    return Handlers(chat, Components("bar", "past", "live", "notice", "composer", "inspector", []))


@pytest.fixture
def visitor(chat):
    """A visitor's request; the visitor leaves at teardown."""
    yield SimpleNamespace(session_hash="somebody")
    chat.leave("somebody")


@contextmanager
def holding(chat) -> Iterator[None]:
    """Keeps the worker from decoding."""
    gate = threading.Event()
    chat.worker.call(gate.wait, BOUND)
    try:
        yield
    finally:
        gate.set()


def answered(chat, conversation, question, pictures=(), settings=None):
    turn = chat.ask(conversation, question, pictures, settings)
    assert all(reply.over.wait(BOUND) for reply in turn.replies)
    return turn


def test_closing_the_page_cancels_the_answer(chat, handlers, visitor):
    async def leave() -> None:
        async with aclosing(handlers.ask(visitor, "Hello.", [], SWITCHES)) as updates:
            assert (await anext(updates))["inspector"] == ""

    with holding(chat):
        asyncio.run(leave())
        (turn,) = handlers.conversation(visitor).turns
        assert not turn.over
    assert turn.main.over.wait(BOUND) and turn.main.finish == "cancelled"


def test_the_latest_answer_is_inspected_if_nobody_waits(chat, handlers, visitor):
    async def at_once() -> dict:
        inspected = asyncio.ensure_future(handlers.inspect_latest(visitor))
        await asyncio.sleep(0)
        assert inspected.done(), "it waits for the model"
        return inspected.result()

    turn = answered(chat, handlers.conversation(visitor), BOTH.question, BOTH.open())
    with holding(chat):
        other = chat.ask(Conversation(), "Hello.")
        assert asyncio.run(at_once()) == {"live": gr.skip()} and turn.main.inspection is None
    assert other.main.over.wait(BOUND)
    before = handlers.turn_updates(handlers.conversation(visitor))["live"]
    found = asyncio.run(handlers.inspect_latest(visitor))
    assert turn.main.inspection.done() and len(found["live"]) > len(before)  # now with attention per token


def test_a_stopped_answer_reports_no_unreached_schedule(chat):
    conversation = Conversation()
    with holding(chat):
        turn = chat.ask(conversation, "Hello.", (), AnswerSettings("long@0,long@9"))
        assert turn.unreached == 0  # there may be more to come
        chat.stop(turn)
    assert turn.main.over.wait(BOUND) and turn.main.finish == "cancelled" and turn.unreached == 0
    html = rendering.turn_html(conversation, 0)
    assert "stopped" in html and "not reached" not in html


def test_the_answer_without_memory_has_no_schedule(chat):
    settings = AnswerSettings("long@0,long@99", compare=True, max_new_tokens=5)
    turn = answered(chat, Conversation(), "Hello.", (), settings)
    late = "1 scheduled after the answer's end, so not reached"
    assert late in rendering.facts(turn, turn.main) and late not in rendering.facts(turn, turn.reply("vanilla"))


def test_an_export_leaves_out_unfinished_turns(chat):
    conversation = Conversation()
    answered(chat, conversation, "What is first?", (), AnswerSettings("off"))
    with holding(chat):
        turn = chat.ask(conversation, "What is second?")
        html = exported(chat, conversation)
        assert "What is first?" in html and "What is second?" not in html
    assert turn.main.over.wait(BOUND)
    assert "What is second?" in exported(chat, conversation)
