"""The worker: tokens do not depend on other requests, every row ends, and nothing leaks."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import tiny

from vismem import NonFiniteError, Request
from vismem.decoding.decoder import Decoder
from vismem.decoding.policies import Forced
from vismem.serving.worker import QueueFullError, Worker, WorkerClosedError

BOUND = 60  # seconds after which a test gives up


class Inbox(queue.Queue):
    """What a listener received."""

    def all(self, rows: int = 1) -> list:
        """All news up to the last row's end."""
        found = []
        while sum(news.finish is not None for news in found) < rows:
            found.append(self.get(timeout=BOUND))
        return found


@pytest.fixture(scope="module")
def model():
    return tiny.equip("idefics3")


@pytest.fixture
def worker(model):
    made = Worker(model, batch_size=4, max_waiting=3, record=True, max_new_tokens=12, eos_token_id=None)
    yield made
    made.close()


def prompt(model, text="look again!", *pictures):
    return tiny.prompts(model.processor, [tiny.message(text, *pictures)])


def test_tokens_equal_generate(model, worker):
    asked = [
        Request(prompt(model, "one", tiny.picture(1)), invocation=Forced([(0, 2, "short"), (0, 5, "long")]), top=1),
        Request(prompt(model, "another one"), generation={"do_sample": True}, seed=3),
    ]
    boxes = [Inbox() for _ in asked]
    tickets = [worker.submit(request, box.put) for request, box in zip(asked, boxes, strict=True)]
    for request, box, ticket in zip(asked, boxes, tickets, strict=True):
        news = box.all()
        policy, seed = request.invocation or "learned", [request.seed or 0]
        settings = {"max_new_tokens": 12, "eos_token_id": None, **request.generation}
        out = model.generate(
            **request.inputs, **settings, invocation=policy, seed=seed, return_dict_in_generate=True, record=True
        )
        tokens = [token for each in news for token in each.tokens]
        assert tokens == out.sequences[0, request.inputs["input_ids"].shape[1] :].tolist()
        assert [one for each in news for one in each.invocations] == out.invocations[0]
        assert [each.finish for each in news] == [None] * (len(news) - 1) + ["length"]
        assert ticket.answers[0].rollout.tokens.tolist() == tokens
        assert sum(len(each.tops) for each in news) == (len(tokens) if request.top else 0)
    assert all(one.length for one in news[0].invocations)  # whole when they are told of
    worker.call(lambda: None).result(BOUND)
    assert worker.rows == 0 and not worker.tickets


def test_each_of_several_rows_ends(model, worker):
    box = Inbox()
    request = Request(prompt(model), generation={"num_return_sequences": 3, "do_sample": True}, seed=1)
    worker.submit(request, box.put, rows=3)
    ended = [news.index for news in box.all(3) if news.finish]
    assert sorted(ended) == [0, 1, 2]


def test_a_full_queue_raises(model, worker):
    hold = threading.Event()
    worker.call(hold.wait, BOUND)
    boxes = [Inbox() for _ in range(7)]
    for box in boxes:
        worker.submit(Request(prompt(model)), box.put)
    assert worker.rows == 7
    with pytest.raises(QueueFullError, match="7 rows are running or waiting, and at most 4 can run and 3 wait"):
        worker.submit(Request(prompt(model)), print)
    hold.set()
    for box in boxes:
        assert box.all()[-1].finish == "length"
    with pytest.raises(ValueError, match="5 rows does not fit a batch of 4"):
        worker.submit(Request(prompt(model)), print, rows=5)
    with pytest.raises(ValueError, match="max_waiting must be 0 or more, got -1"):
        Worker(model, max_waiting=-1)


def test_waiting_and_running_rows_can_be_cancelled(model, worker):
    long = {"max_new_tokens": 10_000}
    boxes = [Inbox() for _ in range(6)]
    tickets = [worker.submit(Request(prompt(model), generation=long), box.put) for box in boxes]
    assert boxes[0].get(timeout=BOUND).finish is None
    for ticket in tickets:
        worker.cancel(ticket)
    assert [box.all()[-1].finish for box in boxes] == ["cancelled"] * 6
    worker.cancel(tickets[0])  # once more does no harm
    box = Inbox()
    worker.submit(Request(prompt(model)), box.put)
    assert box.all()[-1].finish == "length"


def test_a_bad_request_fails_alone(model, worker):
    good, bad, wrong = Inbox(), Inbox(), Inbox()
    worker.submit(Request(prompt(model)), good.put)
    worker.submit(Request(prompt(model), invocation=Forced([(0, 0, "short")])), bad.put)  # no image to look at
    worker.submit(Request(prompt(model), generation={"num_return_sequences": 2}), wrong.put)  # said to be one row
    assert good.all()[-1].finish == "length"
    (news,) = bad.all()
    assert news.finish == "error" and "image" in str(news.error)
    (news,) = wrong.all()
    assert news.finish == "error" and "2 rows, not 1" in str(news.error)


def test_a_failing_listener_cancels_its_request(model, worker):
    def listener(news):
        raise RuntimeError("gone")

    box = Inbox()
    ticket = worker.submit(Request(prompt(model), generation={"max_new_tokens": 10_000}), listener)
    worker.submit(Request(prompt(model)), box.put)
    assert box.all()[-1].finish == "length"
    worker.call(lambda: None).result(BOUND)
    assert ticket.answers[0].finish == "cancelled" and worker.rows == 0


def test_the_worker_survives_a_failed_step(model, worker, monkeypatch):
    step = worker.queue.step

    def failing():
        monkeypatch.setattr(worker.queue, "step", step)
        worker.queue.clear()
        raise MemoryError("no room")

    box = Inbox()
    monkeypatch.setattr(worker.queue, "step", failing)
    worker.submit(Request(prompt(model)), box.put)
    assert box.all()[-1].finish == "cancelled"
    worker.submit(Request(prompt(model)), box.put)
    assert box.all()[-1].finish == "length"


def test_a_prompt_that_cannot_be_read_is_logged(model, worker, monkeypatch, caplog):
    box = Inbox()
    monkeypatch.setattr(Decoder, "read_prompts", lambda *_: 1 / 0)
    worker.submit(Request(prompt(model)), box.put)
    assert isinstance(box.all()[0].error, ZeroDivisionError) and "could not be read: division" in caplog.text


def test_a_non_finite_answer_fails_alone(model, worker, caplog):
    good, bad = Request(prompt(model, "one", tiny.picture(1))), Request(prompt(model, "one", tiny.picture(2)))
    bad.inputs["pixel_values"] = bad.inputs["pixel_values"] * float("nan")
    boxes = Inbox(), Inbox()
    for request, box in zip((bad, good), boxes, strict=True):
        worker.submit(request, box.put)
    failed, written = boxes[0].all()[-1], boxes[1].all()
    assert failed.finish == "error" and isinstance(failed.error, NonFiniteError) and failed.tokens == []
    assert written[-1].finish == "length" and "its hidden states are not finite" in caplog.text
    out = model.generate(**good.inputs, max_new_tokens=12, eos_token_id=None)
    assert [t for news in written for t in news.tokens] == out[0, good.inputs["input_ids"].shape[1] :].tolist()


def test_an_error_holds_no_tensors(model, worker, monkeypatch):
    """Not even in reference cycles, which are collected only now and then."""
    monkeypatch.setattr(Decoder, "read_prompts", lambda *_: int("a wrong number"))
    request, box = Request(prompt(model, "one", tiny.picture(1))), Inbox()
    pixels = weakref.ref(request.inputs["pixel_values"])
    gc.disable()
    try:
        worker.submit(request, box.put)
        del request
        assert "wrong number" in str(box.all()[0].error)
        worker.call(lambda: None).result(BOUND)
        assert pixels() is None
    finally:
        gc.enable()


def test_the_death_of_the_thread_is_reported(model, monkeypatch):
    worker = Worker(model, max_new_tokens=10_000, eos_token_id=None)
    box = Inbox()
    monkeypatch.setattr(worker.queue, "cancel", lambda _: 1 / 0)  # as on a device that is lost
    ticket = worker.submit(Request(prompt(model), generation={"num_return_sequences": 2}), box.put, 2)
    worker.cancel(ticket)
    ends = [news for news in box.all(2) if news.finish]
    assert all(isinstance(news.error, ZeroDivisionError) for news in ends)
    worker.close()
    assert not worker.alive
    with pytest.raises(WorkerClosedError):
        worker.submit(Request(prompt(model)), box.put)


def test_the_death_of_the_thread_fails_pending_calls(model, monkeypatch):
    worker, gate, box = Worker(model, max_new_tokens=10_000, eos_token_id=None), threading.Event(), Inbox()
    monkeypatch.setattr(worker.queue, "cancel", lambda _: 1 / 0)
    ticket = worker.submit(Request(prompt(model)), box.put)
    first = worker.call(gate.wait, BOUND)
    worker.cancel(ticket)  # where it ends
    late, given_up = worker.call(print), worker.call(print)
    assert given_up.cancel()
    gate.set()
    assert isinstance(late.exception(BOUND), ZeroDivisionError) and first.result(BOUND) and given_up.cancelled()
    assert isinstance(box.all()[-1].error, ZeroDivisionError)
    with pytest.raises(WorkerClosedError):
        worker.call(print)


def test_the_death_of_the_thread_is_reported_only_for_running_rows(model, monkeypatch):
    worker, box = Worker(model, max_new_tokens=10_000, eos_token_id=None), Inbox()
    ticket = worker.submit(Request(prompt(model), generation={"num_return_sequences": 2}), box.put, 2)
    worker.cancel(ticket, 0)
    news = box.all()
    assert (news[-1].index, news[-1].finish) == (0, "cancelled")
    monkeypatch.setattr(worker.queue, "cancel", lambda _: 1 / 0)
    worker.cancel(ticket)
    worker.thread.join(BOUND)
    ends = [(each.index, each.finish) for each in box.queue if each.finish]
    assert not worker.alive and ends == [(1, "error")]


def test_calls_run_between_steps(model, worker):
    box = Inbox()
    worker.submit(Request(prompt(model), generation={"max_new_tokens": 10_000}), box.put)
    assert worker.call(threading.current_thread).result(BOUND) is worker.thread
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0).result(BOUND)
    assert worker.alive


def test_close_lets_rows_finish(model):
    worker = Worker(model, batch_size=2, max_new_tokens=12, eos_token_id=None)
    box = Inbox()
    worker.submit(Request(prompt(model)), box.put)
    worker.close(finish_within=BOUND)
    assert box.all()[-1].finish == "length" and not worker.alive
    with pytest.raises(WorkerClosedError):
        worker.submit(Request(prompt(model)), box.put)
    with pytest.raises(WorkerClosedError):
        worker.call(print)
    worker.close()


def test_close_cancels_long_rows(model):
    worker = Worker(model, batch_size=1, max_new_tokens=1_000_000, eos_token_id=None)
    boxes = [Inbox(), Inbox()]
    for box in boxes:
        worker.submit(Request(prompt(model)), box.put)
    boxes[0].get(timeout=BOUND)
    worker.close()
    assert [box.all()[-1].finish for box in boxes] == ["cancelled", "cancelled"]


def test_a_second_close_does_not_extend_the_deadline(model):
    worker, gate, box = Worker(model, max_new_tokens=12, eos_token_id=None), threading.Event(), Inbox()
    worker.call(gate.wait, BOUND)
    worker.submit(Request(prompt(model)), box.put)
    worker.call(lambda: (worker.close(), worker.close(finish_within=BOUND)))  # in its own thread none waits for it
    gate.set()
    assert box.all()[-1].finish == "cancelled"
    worker.close()


def test_an_idle_worker_sleeps(model, worker):
    """It waits to be woken instead of polling."""
    box = Inbox()
    worker.submit(Request(prompt(model)), box.put)
    box.all()
    worker.call(lambda: None).result(BOUND)
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        frame = sys._current_frames()[worker.thread.ident]
        if (frame.f_code.co_name, Path(frame.f_code.co_filename).stem) == ("wait", "threading"):
            break
    else:
        pytest.fail("an idle worker never waits")
    assert worker.alive and not worker.tickets
