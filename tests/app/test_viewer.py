"""The viewer without a browser: conversations on the pocket model, errors, exports, colours, the command."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from contrast import contrast
from forked import Forked
from PIL import Image

pytest.importorskip("gradio", reason="the viewer's extra is not installed")

import gradio as gr

from vismem import cli
from vismem.app import chat as chat_module
from vismem.app import rendering
from vismem.app.chat import MAX_PICTURES, Chat, read_picture
from vismem.app.examples import examples
from vismem.app.export import exported
from vismem.app.handlers import Components, Handlers, settings_of
from vismem.app.session import AnswerSettings, ChatError, Conversation
from vismem.cli import app as command
from vismem.cli.parsing import CommandError
from vismem.loading import Loaded, load_model
from vismem.serving.lifespan import listening_socket

BOUND = 60  # seconds after which a test gives up
BOTH = examples()[1]  # invokes short, then long
SWITCHES = (False, "learned", "", 0.25, "anywhere", 0, 0, 64)  # the page's switches at their defaults


@pytest.fixture(scope="module")
def loaded():
    return load_model(device="cpu")


@pytest.fixture(scope="module")
def chat(loaded):
    made = Chat(loaded, batch_size=4, max_waiting=4)
    yield made
    made.close()


def answered(chat, conversation, question, pictures=(), settings=None):
    turn = chat.ask(conversation, question, pictures, settings)
    assert all(reply.over.wait(BOUND) for reply in turn.replies)
    return turn


def generated(model, conversation, question, pictures, **more):
    """Text and invocations from `generate`."""
    inputs = model.processor.apply_chat_template(
        conversation.messages(question, pictures),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=256, return_dict_in_generate=True, **more)
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ends = set(model.tokens.end_ids.values())
    words = [token for token in new if token not in ends and token not in model.tokens.kind_of]
    return model.processor.decode(words, skip_special_tokens=True), out.invocations[0]


# Conversations.


def test_answers_are_those_of_generate(chat):
    for settings, invocation in ((None, "learned"), (AnswerSettings("off"), "off"), (AnswerSettings("long"), "long")):
        turn = answered(chat, Conversation(), BOTH.question, BOTH.open(), settings)
        text, invocations = generated(chat.model, Conversation(), BOTH.question, BOTH.open(), invocation=invocation)
        reply = turn.main
        assert (reply.text, reply.invocations, reply.finish) == (text, invocations, "stop")
        assert [piece.kind for piece in reply.pieces if piece.kind] == [one.kind for one in invocations]
        assert [token.index for token in reply.tokens if token.part == "mark"] == list(range(len(invocations)))


def right(scene, question):
    """The correct answer to a question of the examples."""
    from vismem.pocket import tasks
    from vismem.pocket.world import PROMOTION_RULES

    given = re.match(r"Row \d, (\w+) label: (\d) (\d) (\d) (\d)", question)
    if given:
        return tasks.promotion_reply(given[1], PROMOTION_RULES[given[1]], [int(each) for each in given.groups()[1:]])
    if "all tags" in question:
        rows = [zip(*pair, strict=True) for pair in zip(scene.colours, scene.shapes, strict=True)]
        return " ".join(f"Row {i}: {', '.join(map(' '.join, row))}." for i, row in enumerate(rows, 1))
    row = int(re.search(r"row (\d)", question)[1]) - 1
    prices, label = list(scene.prices[row]), scene.labels[row]
    if place := re.search(r"column (\d)", question):
        column = int(place[1]) - 1
        return f"{scene.colours[row][column]} {scene.shapes[row][column]} {prices[column]}."
    if "promotion" in question:
        return tasks.promotion_reply(label, PROMOTION_RULES[label], prices)
    if "sum" in question:
        return tasks.sum_reply(prices)
    if "label" in question:
        return f"{label}."
    return f"{' '.join(scene.colours[row]) if 'colours' in question else tasks.spaced(prices)}."


@pytest.mark.parametrize("example", examples(), ids=lambda each: each.title)
def test_examples_show_what_their_cards_say(chat, example):
    world = pytest.importorskip("vismem.pocket.world")
    pytest.importorskip("sklearn")
    scene = example.scene and world.sample_scene(Random(example.scene), "test")
    assert [np.asarray(each).tolist() for each in example.open()] == (
        [world.render_array(scene).tolist()] if scene else []
    )
    conversation, pictures = Conversation(), example.open()
    for question in (example.question, *example.next):
        turn = answered(chat, conversation, question, pictures)
        answer, expected = (
            " ".join(text.replace(":", " ").split()) for text in (turn.main.text, right(scene, question))
        )
        assert answer.endswith(expected)
        if question == example.question:
            assert {one.kind for one in turn.main.invocations} == set(example.kinds)
        pictures = []
    assert sum(path.stat().st_size for path in Path(chat_module.__file__).parent.glob("examples/*.png")) < 100_000


def test_later_turns_keep_the_picture_and_earlier_text(chat):
    conversation = Conversation()
    answered(chat, conversation, BOTH.question, BOTH.open())
    answered(chat, conversation, "Read the prices of row 2.")
    messages = conversation.messages("And row 3?", [])
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    kinds = [part["type"] for message in messages for part in message["content"]]
    assert kinds == ["image", "text", "text", "text", "text", "text"]
    assert messages[1]["content"][0]["text"].startswith("Row 2 mint third double.")  # no markers
    turn = answered(chat, conversation, "What is at row 3, column 4?")
    assert turn.main.text.endswith("blue cross 7.") and len(turn.seen) == 1


def test_the_answer_without_memory_is_the_bases(chat, monkeypatch):
    rows, step = [], chat.worker.queue.step

    def counted():
        found = step()
        rows.append(len(chat.worker.queue.answers) + len(found))
        return found

    monkeypatch.setattr(chat.worker.queue, "step", counted)
    turn = answered(chat, Conversation(), BOTH.question, BOTH.open(), AnswerSettings(compare=True))
    assert [reply.side for reply in turn.replies] == ["vanilla", "memory"] and max(rows) == 2  # in one live batch
    vanilla, _ = generated(chat.model, Conversation(), BOTH.question, BOTH.open(), invocation="off")
    memory, invocations = generated(chat.model, Conversation(), BOTH.question, BOTH.open())
    assert (turn.reply("vanilla").text, turn.main.text) == (vanilla, memory) and vanilla != memory
    assert not turn.reply("vanilla").invocations and turn.main.invocations == invocations
    assert "The answers differ." in rendering.turn_html(conversation_of(turn), 0)
    assert len(answered(chat, Conversation(), "Hello.", (), AnswerSettings("off", compare=True)).replies) == 1


def conversation_of(*turns):
    return Conversation(list(turns))


def test_a_seed_decides_the_answer(chat):
    texts = [
        answered(chat, Conversation(), BOTH.question, BOTH.open(), AnswerSettings(temperature=1.5, seed=seed)).main.text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_schedules_and_random_invocations_are_followed(chat):
    turn = answered(chat, Conversation(), "Read row 1.", BOTH.open(), AnswerSettings("short@0,long@2,long@99"))
    assert [(one.kind, one.position, one.forced) for one in turn.main.invocations] == [
        ("short", 0, True),
        ("long", 4, True),  # after the short one's two tokens and two words
    ]
    assert turn.unreached == 1 and "1 scheduled after the answer" in rendering.turn_html(conversation_of(turn), 0)
    turn = answered(
        chat, Conversation(), "Read row 1.", BOTH.open(), AnswerSettings("random:1@anywhere", max_new_tokens=3)
    )
    assert turn.main.invocations and all(one.forced for one in turn.main.invocations)
    assert turn.main.finish == "length" and "cut off" in rendering.turn_html(conversation_of(turn), 0)


def test_switches_become_settings():
    rest = (0.25, "anywhere", 0.5, 3, 64)
    assert settings_of(True, "schedule", " short@0, long@12 ", *rest) == AnswerSettings(
        "short@0,long@12", True, 0.5, 3, 64
    )
    assert settings_of(False, "random", "", *rest).invocation == "random:0.25@anywhere"
    assert settings_of(False, "learned", "nonsense", *rest).invocation == "learned"
    assert settings_of(False, "schedule", "long@0 SHORT@3,,long@9 ", *rest).invocation == "long@0,short@3,long@9"
    with pytest.raises(ChatError, match="schedule is empty"):
        settings_of(False, "schedule", " , ", *rest)
    for wrong in ("shrt@0", "short@", "short@-1", "long@1.5", "short", "off", "random:1@anywhere", "long@٣"):
        with pytest.raises(ChatError, match=re.escape(f"Cannot parse “{wrong}” in the schedule: write a kind")):
            settings_of(False, "schedule", f"long@0, {wrong}", *rest)
    assert rendering.policy_label("random:0.5@anywhere") == "at random, 0.5 before any token"
    assert rendering.policy_label("random:0.2@delimiter") == "at random, 0.2 after each phrase"
    with pytest.raises(ChatError, match="need a number"):
        settings_of(False, "learned", "", 0.25, "anywhere", 0, None, 64)
    for rate, where in ((None, "anywhere"), (0.25, None)):
        with pytest.raises(ChatError, match="each need a value"):
            settings_of(False, "random", "", rate, where, 0, 0, 64)
    for number in (1.5, float("inf"), float("nan")):
        with pytest.raises(ChatError, match=f"seed must be a whole number, 0 or more, not {number:g}"):
            settings_of(False, "learned", "", 0.25, "anywhere", 0, number, 64)
    with pytest.raises(ChatError, match=r"3,500 characters; the limit is 2,000"):
        settings_of(False, "schedule", "long@0," * 500, *rest)
    with pytest.raises(ChatError, match="half a character"):
        settings_of(False, "schedule", "\ud800", *rest)


@pytest.mark.parametrize("family", tiny.UNLIKE)
def test_the_viewer_works_with_any_family(family):
    made = Chat(Loaded(tiny.equip(family), family, None), batch_size=2)
    try:
        conversation, pictures = Conversation(), [tiny.picture(1), tiny.picture(2)]
        settings = AnswerSettings("short@1,long@3", compare=True, max_new_tokens=6)
        for question in ("Look here.", "And again?"):
            turn = answered(made, conversation, question, pictures, settings)
            pictures = []
        found = made.inspect(turn, "memory").result(BOUND)
        assert [moment.kind for moment in found.moments] == ["short", "long"]
        assert len(found.moments[0].looked.maps) == 2 and not found.moments[1].missing
        conversation.selected = (1, "memory", 0)
        assert "vm-panel" in rendering.inspector(conversation)
        assert "untrained" in rendering.bar(made, conversation) and "Drop in" in rendering.welcome(made)
    finally:
        made.close()


# Errors.


@pytest.mark.parametrize(
    ("question", "pictures", "settings", "message"),
    [
        (" \n", 0, {}, "question is empty"),
        ("What is <image> this?", 1, {}, "special token <image>"),
        ("x" * 9000, 0, {}, "9,000 characters"),
        ("half \ud800", 0, {}, "half a character"),
        ("Read row 1.", 1, {"invocation": ",".join(["long@0"] * 65)}, "may have at most 64 invocations, not 65"),
        ("Read row 1.", 0, {"invocation": "short@0"}, "there is none: add one"),
        ("Read row 1.", 1, {"invocation": "shirt@0"}, "unknown policy 'shirt@0'"),
        ("Read row 1.", 1, {"invocation": "random:2"}, "rate from 0 to 1"),
        ("Read row 1.", 1, {"temperature": -1.0}, "temperature must be"),
        ("Read row 1.", 1, {"seed": -1}, "seed must be"),
        ("Read row 1.", 1, {"max_new_tokens": 0}, "1 to 4096 tokens"),
        ("Read row 1.", 1, {"max_new_tokens": 4090}, "conversation is too long"),
        ("Read row 1.", MAX_PICTURES + 1, {}, "9 images; a conversation may have 8"),
    ],
)
def test_refusals_are_one_line(chat, question, pictures, settings, message):
    conversation = Conversation()
    with pytest.raises(ChatError, match=re.escape(message)) as caught:
        chat.ask(conversation, question, BOTH.open() * pictures, AnswerSettings(**settings))
    assert "\n" not in str(caught.value) and not conversation.turns and not chat.worker.rows


def test_a_second_question_waits_until_the_first_is_done_or_stopped(chat, held):
    conversation = Conversation()
    turn = chat.ask(conversation, BOTH.question, BOTH.open())
    with pytest.raises(ChatError, match="still being written"):
        chat.ask(conversation, "And now?")
    with pytest.raises(ChatError, match="Nothing to inspect yet"):
        chat.inspect(turn, "memory")
    chat.stop(turn)
    held.set()
    assert turn.main.over.wait(BOUND) and turn.main.finish == "cancelled" and not conversation.busy
    assert "stopped" in rendering.turn_html(conversation, 0)
    messages = conversation.messages("Read the prices of row 2.", [])  # no answer: its picture passes to the next turn
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"] and len(messages) == 1


def test_a_stopped_answer_keeps_its_text_and_can_be_inspected(chat):
    conversation = Conversation()
    turn = chat.ask(conversation, "Describe all tags.", examples()[3].open(), AnswerSettings(compare=True))
    while len(turn.main.tokens) < 12:
        assert not turn.main.over.wait(0.001)
    chat.stop(turn)
    assert all(reply.over.wait(BOUND) for reply in turn.replies) and turn.main.finish == "cancelled"
    assert turn.main.text.startswith("Row 1")
    assert chat.inspect(turn, "memory").result(BOUND).moments[0].looked is not None
    assert len(conversation.messages("More?", [])) == 3


def test_a_full_queue_refuses(loaded):
    small = Chat(loaded, batch_size=1, max_waiting=1)
    try:
        gate = threading.Event()
        small.worker.call(gate.wait, BOUND)
        first, second = Conversation(), Conversation()
        turn = small.ask(first, "Hello.")
        with pytest.raises(ChatError, match="busy with other questions"):
            small.ask(second, "Hello.", (), AnswerSettings(compare=True))  # room for one of the two
        assert not second.turns
        half = list(small.worker.tickets)[-1]
        gate.set()
        assert turn.main.over.wait(BOUND) and turn.main.finish == "stop"
        small.worker.call(lambda: None).result(BOUND)
        assert half.answers[0].finish == "cancelled"  # its other half was refused
        assert answered(small, second, "Hello.").main.finish == "stop"
    finally:
        small.close()
    with pytest.raises(ChatError, match="shutting down"):
        small.ask(Conversation(), "Hello.")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), "ran out of memory"),
        (RuntimeError("<b>no\nluck</b>"), "failed while writing this (&lt;b&gt;no luck&lt;/b&gt;)"),
    ],
)
def test_a_failing_model_is_reported(chat, monkeypatch, error, message):
    def failing(groups):
        raise error

    queue = chat.worker.queue
    conversation = Conversation()
    with monkeypatch.context() as patch:
        patch.setattr(queue, "admit", failing)
        turn = answered(chat, conversation, "Hello.")
    assert turn.main.finish == "error" and turn.main.error and "\n" not in turn.main.error
    assert message in rendering.turn_html(conversation, 0)
    with pytest.raises(ChatError):
        chat.inspect(turn, "memory")
    assert answered(chat, conversation, "Hello.").main.finish == "stop"


def test_invalid_pictures_are_refused_with_a_reason(tmp_path, monkeypatch):
    good, broken, text = tmp_path / "good.png", tmp_path / "broken.png", tmp_path / "text.png"
    Image.new("RGB", (40, 30), "red").save(good)
    broken.write_bytes(good.read_bytes()[:60])
    text.write_text("no picture")
    assert read_picture(good).size == (40, 30)
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (2, 900)).save(tmp_path / "line.png")
    for name, message in (
        ("broken.png", "cannot be used: the file is truncated."),
        ("text.png", "cannot be used: it is not an image, or has a format other than PNG, JPEG, WEBP, GIF, BMP."),
        ("empty.png", "cannot be used: it is empty."),
        ("line.png", "cannot be used: its longer side is more than 200 times its shorter one."),
        ("none.png", "is no longer available: upload it again."),
    ):
        with pytest.raises(ChatError) as caught:
            read_picture(tmp_path / name)
        assert str(caught.value) == f"Image {name} {message}"
    monkeypatch.setattr(chat_module, "MAX_PIXELS", 100)
    with pytest.raises(ChatError, match="has more than 100 pixels, the limit"):
        read_picture(good)


def test_image_metadata_is_dropped(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where it was taken"  # rotated
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photograph.jpg", exif=exif)
    found = read_picture(tmp_path / "photograph.jpg")
    assert (found.size, found.mode, dict(found.getexif())) == ((30, 40), "RGB", {})
    assert "taken" not in str(found.info)


def test_thumbnails_are_made_once(chat, monkeypatch):
    made, thumbnail = [], rendering.thumbnail
    monkeypatch.setattr(rendering, "thumbnail", lambda picture: made.append(picture) or thumbnail(picture))
    turn = answered(chat, Conversation(), "Hello.", [Image.new("RGB", (3000, 20)), *BOTH.open()])
    pages = {rendering.turn_html(conversation_of(turn), 0) for _ in range(3)}
    assert len(pages) == 1 and len(made) == 2 and pages.pop().count("<img") == 2
    monkeypatch.setattr(chat_module, "MAX_TOTAL_PIXELS", 100_000)
    with pytest.raises(ChatError, match="may have 100,000 pixels in all"):
        chat.ask(conversation_of(turn), "And these?", [Image.new("RGB", (300, 300))])


# Inspections and visitors.


def test_an_inspection_runs_once_and_frees_its_inputs(chat):
    conversation = Conversation()
    turn = answered(chat, conversation, BOTH.question, BOTH.open(), AnswerSettings(compare=True))
    future = chat.inspect(turn, "memory")
    assert [moment.kind for moment in future.result(BOUND).moments] == ["short", "long"]
    assert chat.inspect(turn, "memory") is future
    chat.worker.call(lambda: None).result(BOUND)
    assert turn.main.ticket is None and not turn.main.inputs
    with pytest.raises(ChatError, match="Nothing to inspect"):
        chat.inspect(turn, "vanilla")  # no invocation
    assert turn.reply("vanilla").inputs
    answered(chat, conversation, "And now?")
    assert not turn.reply("vanilla").inputs and turn.reply("vanilla").ticket is None  # it cannot be inspected
    conversation.selected = (0, "memory", 1)
    assert 'aria-expanded="true"' in rendering.turn_html(conversation, 0)
    assert "vm-panel vm-long" in rendering.inspector(conversation)
    turn.main.inspection = Future()
    assert "Inspecting the answer" in rendering.inspector(conversation)
    turn.main.inspection.set_exception(RuntimeError("no\nluck"))
    assert "Cannot inspect this answer: no luck" in rendering.inspector(conversation)


def test_too_many_pictures_are_refused_before_one_is_decoded(tmp_path, monkeypatch):
    files = []
    for number in range(9):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{number}.png")
        files.append(tmp_path / f"{number}.png")
    monkeypatch.setattr(chat_module, "MAX_TOTAL_PIXELS", 25_000)
    with pytest.raises(ChatError, match="may have 25,000 pixels in all"):
        chat_module.read_pictures(files[:3], Conversation())
    assert len(chat_module.read_pictures(files[:2], Conversation())) == 2
    decoded = []
    monkeypatch.setattr(chat_module, "read_picture", lambda *given: decoded.append(given))
    with pytest.raises(ChatError, match="9 images; a conversation may have 8"):
        chat_module.read_pictures(files, Conversation())
    assert decoded == []


def test_a_temperature_that_no_float_can_hold_is_greedy(chat):
    one, other = (answered(chat, Conversation(), "Hello.", [], AnswerSettings(temperature=t)) for t in (1e-39, 0.0))
    assert one.main.text == other.main.text != ""


def test_concurrent_inspections_share_one_result(chat, monkeypatch):
    turn = answered(chat, Conversation(), BOTH.question, BOTH.open())
    meeting, call, found = threading.Barrier(2), chat.worker.call, []

    def together(function):
        with suppress(threading.BrokenBarrierError):
            meeting.wait(0.5)  # breaks where only one comes
        return call(function)

    monkeypatch.setattr(chat.worker, "call", together)
    threads = [threading.Thread(target=lambda: found.append(chat.inspect(turn, "memory"))) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(BOUND)
    assert found[0] is found[1] and found[0].result(BOUND).moments


def test_visitors_may_come_from_many_threads(chat):
    failed = []

    def come(name):
        try:
            for number in range(300):
                chat.conversation(f"{name}-{number % 7}", new=True)
        except RuntimeError as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=come, args=(name,)) for name in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(BOUND)
    finally:
        sys.setswitchinterval(interval)
        chat.leave_all()
    assert failed == []


def test_visitors_are_separate(chat, held, monkeypatch):
    one, two = chat.conversation("one"), chat.conversation("two")
    assert one is not two and chat.conversation("one") is one
    turn, other = chat.ask(one, "Hello."), chat.ask(two, "Hello.")
    chat.leave("one")
    held.set()
    assert turn.main.over.wait(BOUND) and other.main.over.wait(BOUND)
    assert (turn.main.finish, other.main.finish) == ("cancelled", "stop")
    assert chat.conversation("one") is not one
    assert chat.conversation("two", new=True) is not two
    monkeypatch.setattr(chat_module, "MAX_VISITORS", 3)
    for number in range(5):
        chat.conversation(f"visitor {number}")
    assert list(chat.visitors) == ["visitor 2", "visitor 3", "visitor 4"]
    turn = chat.ask(chat.visitors["visitor 3"], "Hello.", [Image.new("RGB", (100, 100))])
    monkeypatch.setattr(chat_module, "MAX_KEPT_PIXELS", 9999)
    assert turn in chat.conversation("visitor 3").turns and list(chat.visitors) == ["visitor 3"]  # not one's own
    chat.conversation("visitor 5")
    assert list(chat.visitors) == ["visitor 5"] and turn.main.over.wait(BOUND)


def test_an_export_is_self_contained(chat):
    conversation = Conversation()
    answered(chat, conversation, BOTH.question, BOTH.open())
    answered(chat, conversation, "What is <i>row</i> 4?", (), AnswerSettings(compare=True, temperature=0.7, seed=3))
    html = exported(chat, conversation)
    assert "What is &lt;i&gt;row&lt;/i&gt; 4?" in html and BOTH.question in html
    assert "without memory" in html and "seed" in html
    marks = sum(len(turn.main.invocations) for turn in conversation.turns)
    assert marks >= 2 and len(re.findall(r'<section class="vm vm-panel', html)) == marks
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html) and "<script" not in html


# Handlers: answers that are abandoned, stopped or still being written.


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


# Colours.


@pytest.mark.parametrize("selector", [r":root", r"\.dark"])
def test_text_and_edges_have_enough_contrast(selector):
    css = rendering.static("page.css")
    block = re.search(rf"^{selector} {{(.*?)}}", css, re.S | re.M)[1]
    colours = dict(re.findall(r"--ui-([\w-]+): (#[0-9a-f]{6})", block))
    grounds = {name: colours[name] for name in ("ground", "card", "well")}
    pairs = [(ink, ground) for ink in ("ink", "faint", "short", "long") for ground in grounds]
    pairs += [("on", "short"), ("ink", "tint-bad"), ("long", "tint-long"), ("short", "tint-short")]
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}
    edges = {(one, two): contrast(colours[one], colours[two]) for one in ("edge", "focus", "bad") for two in grounds}
    assert {pair: ratio for pair, ratio in edges.items() if ratio < 3} == {}  # non-text needs 3:1


# The command.


def test_help_usage_errors_and_a_missing_extra_are_reported(capsys, monkeypatch):
    assert cli.main(["app", "--help"]) == 0
    assert "vismem app --checkpoint" in capsys.readouterr().out
    assert cli.main(["app", "--port", "99999"]) == 2
    assert cli.main(["app", "--share"]) == 2
    capsys.readouterr()
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert cli.main(["app"]) == 1
    assert capsys.readouterr().err == 'vismem: error: the viewer needs gradio: pip install "vismem[app]"\n'


def test_a_taken_port_is_an_error_unless_none_was_named(capsys, monkeypatch):
    taken = listening_socket("127.0.0.1", 0)
    port = taken.getsockname()[1]
    try:
        assert cli.main(["app", "--port", str(port)]) == 1
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
        monkeypatch.setattr(command, "FIRST_PORT", port)
        with command.free_socket("127.0.0.1", None) as found:
            assert found.getsockname()[1] != port
        assert cli.main(["app", "--host", "no.such.host.invalid"]) == 1
        assert "cannot listen on no.such.host.invalid" in capsys.readouterr().err
    finally:
        taken.close()


def test_the_password_comes_from_a_file_or_the_environment(tmp_path, capsys):
    file = tmp_path / "password"
    file.write_text(" open sesame\n")
    environ = {command.PASSWORD_VARIABLE: "from outside"}
    assert command.read_password(None, {}) is None
    assert command.read_password(None, environ) == "from outside"
    assert command.read_password(file, environ) == "open sesame"
    for content, reason in (
        (b"\n", "is empty"),
        (b"\xff", "cannot read the viewer's"),
        (None, "No such file"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        assert cli.main(["app", "--password-file", str(file)]) == 1
        assert reason in capsys.readouterr().err
    with pytest.raises(CommandError, match="VISMEM_APP_PASSWORD is empty"):
        command.read_password(None, {command.PASSWORD_VARIABLE: " "})


def test_ctrl_c_stops_it():
    with Forked(cli.main, ["app", "--port", "0", "--no-browser", "--device", "cpu"]) as process:
        line = process.stdout.readline()
        address = re.fullmatch(r"VisMem is at (http://127\.0\.0\.1:\d+) - Ctrl-C stops it\n", line)[1]
        with urllib.request.urlopen(address, timeout=BOUND) as answer:
            assert answer.status == 200 and "default-src 'self'" in answer.headers["Content-Security-Policy"]
        strange = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(strange, timeout=BOUND)
        process.send_signal(signal.SIGINT)
        assert process.wait(BOUND) == 0 and process.rest() == ("", "")
