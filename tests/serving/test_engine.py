"""The server through OpenAI's client: answers, concurrency, and failures."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress

import httpx
import openai
import pytest
import tiny
from loopback import connected, post
from PIL import Image, ImageOps
from serving_clients import BOUND, JSON, QUESTION, SHELF, ask, client_of, own, running, uri, user, wait_for
from starlette.requests import Request

from vismem.serving.engine import Engine, Load
from vismem.serving.errors import ApiError
from vismem.serving.lifespan import Server, address_of, config_of, listening_socket, serve
from vismem.serving.protocol import ChatRequest
from vismem.serving.server import ClientDisconnectedError, ServingConfig, application, streamed, while_connected


def hello(**more) -> ChatRequest:
    off = {"messages": [{"role": "user", "content": "Hello"}], "vismem": {"invocation": "off"}}
    return ChatRequest(model="pocket", **off, **more)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, batch_size=4, max_waiting=6, max_tokens=200)


@pytest.fixture(scope="module")
def address(engine):
    with running(application(engine, ServingConfig("pocket", answer_timeout=BOUND))) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with client_of(address) as found:
        yield found


@pytest.mark.parametrize("invocation", ["learned", "off", "long", "short@0,long@3", "random:0.5"])
def test_text_equals_generate(client, model, invocation):
    found = ask(client, seed=5, extra_body={"vismem": {"invocation": invocation}})
    text, invocations = own(model, invocation=invocation, seed=5)
    choice = found.choices[0]
    assert choice.message.content == text and choice.finish_reason == "stop"
    told = choice.vismem["invocations"]
    assert [(i["kind"], i["position"], i["length"], i["forced"]) for i in told] == [
        (i.kind, i.position, i.length, i.forced) for i in invocations
    ]
    assert found.vismem == {"seed": 5, "invocation": invocation}
    memory = found.usage.model_extra["memory"]
    for kind in ("short", "long"):
        assert memory[f"{kind}_vectors"] == sum(i.length for i in invocations if i.kind == kind)
    assert memory["invocation_tokens"] == 2 * len(invocations)
    words = len(model.processor.tokenizer.encode(text, add_special_tokens=False)) + 1
    assert found.usage.completion_tokens == words
    assert found.usage.total_tokens == found.usage.prompt_tokens + words


def test_transparent_images_are_handled_as_by_the_base(client, model):
    grey = SHELF.convert("L")
    nothing = Image.new("L", grey.size)
    ink = Image.merge("RGBA", (nothing, nothing, nothing, ImageOps.invert(grey)))
    answer = ask(client, user(QUESTION, ink)).choices[0].message.content
    assert answer == own(model, pictures=[ink])[0] != own(model, pictures=[ink.convert("RGB")])[0]


def test_stream_chunks_join_to_the_answer(client):
    whole = ask(client, logprobs=True, top_logprobs=2)
    chunks = list(ask(client, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    choices = [choice for chunk in parts for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[0].delta.role == "assistant" and choices[-1].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1 and len(parts) > 10
    traced = [choice.model_extra["vismem"]["invocations"] for choice in choices if "vismem" in choice.model_extra]
    assert [one for some in traced for one in some] == whole.choices[0].vismem["invocations"] != []
    written = ""
    for choice in choices:  # each is told of where it happened
        if "vismem" in choice.model_extra:
            assert choice.model_extra["vismem"]["invocations"][0]["offset"] == len(written)
        written += choice.delta.content or ""
    assert last.choices == [] and last.usage == whole.usage
    logprobs = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert logprobs == whole.choices[0].logprobs.content and len(logprobs) > 10
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)
    assert parts[0].model_extra["vismem"].keys() == {"seed", "invocation"}


def test_the_trace_can_be_turned_off(client):
    quiet = {"vismem": {"trace": False}}
    assert ask(client, extra_body=quiet).choices[0].vismem is None
    chunks = list(ask(client, extra_body=quiet, stream=True))
    assert not any("vismem" in choice.model_extra for chunk in chunks for choice in chunk.choices)


def test_choice_n_uses_seed_plus_n(client, model):
    settings = {"temperature": 1.3, "top_p": 0.95, "max_tokens": 20}
    found = ask(client, n=3, seed=7, **settings, extra_body={"vismem": {"invocation": "short@1"}})
    sampling = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "max_new_tokens": 20}
    for index, choice in enumerate(found.choices):
        text, invocations = own(model, invocation="short@1", seed=7 + index, **sampling)
        assert choice.index == index and choice.message.content == text
        assert len(choice.vismem["invocations"]) == len(invocations) == 1
    assert len({choice.message.content for choice in found.choices}) > 1
    assert found.usage.completion_tokens <= 60
    again = ask(
        client, n=1, seed=found.vismem["seed"] + 2, **settings, extra_body={"vismem": {"invocation": "short@1"}}
    )
    assert again.choices[0].message.content == found.choices[2].message.content


def test_a_returned_seed_reproduces_the_answer(client):
    first = ask(client, temperature=1.5, max_tokens=20)
    assert 0 <= first.vismem["seed"] < 2**53
    second = ask(client, temperature=1.5, max_tokens=20, seed=first.vismem["seed"])
    assert first.choices[0].message == second.choices[0].message


def test_stop_strings_and_max_tokens_end_an_answer(client, model):
    text, _ = own(model)
    found = ask(client, stop=["So", "never"], max_tokens=100)
    assert found.choices[0].message.content == text[: text.index("So")] and found.choices[0].finish_reason == "stop"
    pieces = ask(client, stop="So", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == text[: text.index("So")]
    short = ask(client, max_completion_tokens=5)
    chosen = len(short.choices[0].vismem["invocations"])  # the model's own decisions are tokens that it sampled
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens + chosen == 5


def test_repetition_penalty_applies_to_greedy_decoding(client, model):
    text, _ = own(model, repetition_penalty=3.0, do_sample=False)
    assert text != own(model)[0]
    found = ask(client, temperature=0, extra_body={"repetition_penalty": 3.0})
    assert found.choices[0].message.content == text


def test_vanilla_is_the_base(client, model):
    text, _ = own(model, invocation="off")
    found = ask(client, model="pocket:vanilla")
    assert found.choices[0].message.content == text and found.choices[0].vismem["invocations"] == []
    assert found.vismem["invocation"] == "off"
    with pytest.raises(openai.BadRequestError, match="no memory to invoke"):
        ask(client, model="pocket:vanilla", extra_body={"vismem": {"invocation": "learned"}})


def test_a_model_name_may_end_in_vanilla():
    request = ChatRequest(model="a:vanilla", messages=[{"role": "user", "content": "hi"}])
    assert ServingConfig("a:vanilla").invocation_for(request) == "learned"
    assert ServingConfig("a").invocation_for(request) == "off"


def test_several_images_and_turns_are_answered(client, model):
    other = SHELF.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turns = [
        user("Read row 1.", SHELF, other),
        {"role": "assistant", "content": "Row 1: 2 1 8 8."},
        {"role": "user", "content": "Read row 2."},
    ]
    shown = [{"type": "image", "image": picture} for picture in (SHELF, other)]
    said = [
        {"role": "user", "content": [*shown, {"type": "text", "text": "Read row 1."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Row 1: 2 1 8 8."}]},
        {"role": "user", "content": [{"type": "text", "text": "Read row 2."}]},
    ]
    text, _ = own(model, *said)
    found = ask(client, *turns)
    assert found.choices[0].message.content == text
    alone = ask(client, {"role": "user", "content": "Read row 2."})
    assert found.usage.prompt_tokens > alone.usage.prompt_tokens + 32


def test_log_probabilities_equal_the_models(client, model):
    found = ask(client, logprobs=True, top_logprobs=3, temperature=1.0, seed=3, max_tokens=12)
    content = [{"type": "image", "image": SHELF}, {"type": "text", "text": QUESTION}]
    inputs = tiny.prompts(model.processor, [[{"role": "user", "content": content}]])
    settings = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 12}
    out = model.generate(**inputs, **settings, seed=[3], record=True, return_dict_in_generate=True, output_scores=True)
    (rollout,) = out.rollout
    end = set(model.tokens.kind_of) | set(model.processor.tokenizer.all_special_ids)
    expected = [
        float(p)
        for p, t, s in zip(rollout.log_probs, rollout.tokens, rollout.sampled, strict=True)
        if s and int(t) not in end
    ]
    entries = found.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=1e-3)
    assert "".join(entry.token for entry in entries) == found.choices[0].message.content
    for entry in entries:
        assert entry.top_logprobs[0].logprob >= entry.logprob and bytes(entry.bytes).decode() == entry.token


def test_models_and_health_are_reported(client, address):
    assert [model.id for model in client.models.list()] == ["pocket", "pocket:vanilla"]
    assert client.models.retrieve("pocket:vanilla").id == "pocket:vanilla"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "waiting": 0, "writing": 0}


WRONG = {
    "no model 'gpt'": {"model": "gpt"},
    "temperature: ": {"temperature": 9},
    "at most 4 rows at a time": {"n": 5},
    "unknown policy 'often'": {"extra_body": {"vismem": {"invocation": "often"}}},
    "max_tokens is 201; this server generates at most 200": {"max_tokens": 201},
    "this server does not support logit_bias": {"logit_bias": {"3": 1}},
    "this server does not support tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "top_logprobs needs logprobs": {"top_logprobs": 2},
    "stream_options needs stream": {"stream_options": {"include_usage": True}},
    "this server does not support functions": {"functions": [{"name": "f"}]},
    "this server does not support tool_choice": {"tool_choice": "required"},
    "this server does not support response_format": {"response_format": {"type": "json_object"}},
    "this server does not support frequency_penalty": {"frequency_penalty": 0.5},
    "this server does not support modalities": {"modalities": ["text", "audio"]},
    "this server does not support structured_outputs": {"extra_body": {"structured_outputs": {"choice": ["a"]}}},
    "this server does not support guided_json": {"extra_body": {"guided_json": {"type": "object"}}},
    "this server does not support min_tokens": {"extra_body": {"min_tokens": 3}},
    "this server does not support messages.1.tool_calls": {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        ]
    },
    "this server does not support messages.0.images": {
        "messages": [{"role": "user", "content": "hi", "images": ["iVBORw0KGgo"]}]
    },
    "messages.0.role: this server does not support tools": {
        "messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]
    },
    "messages.0.content.0: a part must be of type text or image_url": {
        "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]
    },
    "min_p: ": {"extra_body": {"min_p": 1.5}},
    "top_k: ": {"extra_body": {"top_k": -2}},
    "seed: ": {"seed": 2**63},
    "messages: is empty": {"messages": []},
    "messages.0.role": {"messages": [{"role": "robot", "content": "hi"}]},
    "messages.0.content.0.image_url": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "only user messages may contain images": {
        "messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    },
    "the reserved token <image>": {"messages": [{"role": "user", "content": "<image>"}]},
    "the reserved token <ms_I>": {"messages": [{"role": "user", "content": "<ms_I>"}]},
    "the reserved token <ms_E>": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("<ms", "_E>")]}]
    },
    "the reserved token <ml_I>": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<ml"},
                    {"type": "image_url", "image_url": {"url": uri(SHELF)}},
                    {"type": "text", "text": "_I>"},
                ],
            }
        ]
    },
    "short-term memory, but no message has an image": {
        "stream": True,  # refused before the stream begins
        "messages": [{"role": "user", "content": "hi"}],
        "extra_body": {"vismem": {"invocation": "short@0"}},
    },
    "not valid Unicode": {"extra_body": {"messages": [{"role": "user", "content": "\ud800"}]}},
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_requests_get_a_one_line_error(client, address, message):
    body = {"model": "pocket", "messages": [{"role": "user", "content": "hi"}], **WRONG[message]}
    body.update(body.pop("extra_body", {}))
    found = httpx.post(f"{address}/v1/chat/completions", content=json.dumps(body), headers=JSON, timeout=BOUND)
    assert found.status_code in (400, 404)
    error = found.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]) and "\n" not in error["message"]


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '"text"', "[" * 100_000, '{"model": 1e999}', "\xff\xfe"])
def test_malformed_bodies_are_refused(address, body):
    found = httpx.post(f"{address}/v1/chat/completions", content=body.encode("latin-1"), headers=JSON, timeout=BOUND)
    assert found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error"


def test_unknown_routes_and_methods_are_refused(address):
    for method, path, status in [
        ("GET", "/v1", 404),
        ("POST", "/", 405),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/health/", 404),
    ]:
        found = httpx.request(method, address + path)
        assert found.status_code == status and found.json()["error"]["message"]


@pytest.fixture
def slow(engine, monkeypatch):
    """Steps that wait, so that answers are under way for as long as a test needs."""
    gate, step = threading.Event(), engine.worker.queue.step

    def waiting():
        gate.wait(0.05)
        return step()

    monkeypatch.setattr(engine.worker.queue, "step", waiting)
    yield gate
    gate.set()
    wait_for(lambda: engine.load().writing == engine.load().waiting == 0)


@pytest.fixture
def endless(model):
    """An engine with room for three rows, whose answers do not end by themselves."""
    made = Engine(model, batch_size=2, max_waiting=1, eos_token_id=None)
    yield made
    asyncio.run(made.close())


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_row(endless, stream):
    with running(application(Unclosed(endless), ServingConfig("pocket"))) as place:
        body = json.dumps({"model": "pocket", "messages": [user(QUESTION, SHELF)], "stream": stream})
        with connected(int(place.rpartition(":")[2])) as raw:
            raw.sendall(post("/v1/chat/completions", body.encode()))
            wait_for(lambda: endless.load().writing == 1)
            (ticket,) = endless.worker.tickets
            if stream:
                assert raw.recv(1)
        wait_for(lambda: not endless.worker.rows)
        assert ticket.answers[0].finish == "cancelled" and endless.preparing_rows == 0


def test_work_is_cancelled_when_the_client_disconnects():
    async def disconnected() -> dict:
        await asyncio.sleep(0)  # until the work is begun
        return {"type": "http.disconnect"}

    async def give_up() -> None:
        work = asyncio.ensure_future(asyncio.Event().wait())
        waiting = asyncio.ensure_future(while_connected(Request({"type": "http"}, disconnected), work))
        for _ in range(20):
            await asyncio.sleep(0)
        assert work.cancelled()
        with pytest.raises(ClientDisconnectedError):
            await waiting

    asyncio.run(give_up())


def test_an_unexpected_error_in_a_stream_is_its_last_event_and_stays_in_the_log(caplog):
    async def events():
        yield b"second"
        raise RuntimeError("secret of the house")

    async def read() -> list[bytes]:
        return [each async for each in streamed(b"first", events())]

    *before, last = asyncio.run(read())
    assert before == [b"first", b"second"] and b"the server failed" in last and b"secret" not in last
    assert "secret of the house" in caplog.text


def test_a_stop_string_ends_decoding(endless):
    asked = {"n": 2, "seed": 7, "temperature": 1.3}

    async def read() -> None:
        texts = ["", ""]
        async for chunk in endless.answer(hello(**asked, max_tokens=40)):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        ours, others = texts
        stop = next(ours[at : at + 4] for at in range(len(ours)) if ours[at : at + 4] not in others)
        async with aclosing(endless.answer(hello(**asked, stop=stop))) as chunks:
            while not (choice := (await anext(chunks)).choices[0]).finish_reason:
                pass
            assert choice.index == 0 and (await anext(chunks)).choices[0].index == 1
            (ticket,) = endless.worker.tickets
            found = endless.worker.call(lambda: [answer.finish for answer in ticket.answers])
            assert await asyncio.wrap_future(found) == ["cancelled", None]

    asyncio.run(asyncio.wait_for(read(), BOUND))


def test_prompts_in_preparation_count_as_waiting(endless):
    gate = threading.Event()
    endless.prompt_thread.submit(gate.wait, BOUND)

    async def read() -> None:
        answers = [endless.answer(hello()) for _ in range(4)]
        firsts = [asyncio.ensure_future(anext(each)) for each in answers]
        try:
            await asyncio.sleep(0)
            assert [first.done() for first in firsts] == [False, False, False, True]
            with pytest.raises(ApiError, match="too many requests are waiting"):
                firsts[3].result()
            assert endless.load() == Load(3, 0)
            gate.set()
            started = await asyncio.gather(*firsts[:3])
            assert all(chunk.usage.prompt_tokens for chunk in started) and endless.preparing_rows == 0
        finally:
            gate.set()
            await asyncio.gather(*firsts, return_exceptions=True)
            for each in answers:
                await each.aclose()

    asyncio.run(read())


def test_prompt_and_answer_may_fill_the_context(endless, monkeypatch):
    async def read(**more) -> tuple:
        *_, last = [chunk async for chunk in endless.answer(hello(**more))]
        return last.usage, last.choices[0].finish_reason

    usage, _ = asyncio.run(read(max_tokens=1))
    monkeypatch.setattr(endless, "context", usage.prompt_tokens + 5)
    for most in (5, None):
        usage, finish = asyncio.run(read(max_tokens=most))
        assert (finish, usage.completion_tokens) == ("length", 5)
    with pytest.raises(ApiError, match="the answer may have 6, but the context is") as refused:
        asyncio.run(read(max_tokens=6))
    assert refused.value.code == "context_length_exceeded"
    monkeypatch.setattr(endless, "context", usage.prompt_tokens + 1)
    assert asyncio.run(read())[0].completion_tokens == 1


def test_a_slow_reader_blocks_nobody(engine):
    """Once it is written, an answer that is still being read counts no more."""

    async def read() -> None:
        async with aclosing(engine.answer(hello())) as it:
            assert (await anext(it)).choices[0].delta.role == "assistant"
            while engine.worker.rows:
                await asyncio.sleep(0.01)
            assert engine.load() == Load(0, 0)
            *_, last = [chunk async for chunk in it]
            assert last.choices[0].finish_reason

    asyncio.run(asyncio.wait_for(read(), BOUND))


def test_text_requests_do_not_wait_for_image_decoding(engine, client, monkeypatch):
    decode, gate = engine.pictures.decode, threading.Event()

    def waiting(files):
        assert gate.wait(BOUND)
        return decode(files)

    monkeypatch.setattr(engine.pictures, "decode", waiting)
    with ThreadPoolExecutor() as pool:
        shown = pool.submit(ask, client)
        try:
            assert ask(client, user("Hello")).choices[0].message.content
            assert not shown.done()
        finally:
            gate.set()
        assert shown.result().choices[0].message.content


def test_a_full_queue_returns_429(engine, client, slow):
    streams = [ask(client, stream=True) for _ in range(10)]
    with pytest.raises(openai.RateLimitError, match="too many requests") as refused:
        ask(client)
    assert refused.value.response.headers["retry-after"]
    assert engine.load().writing <= 4
    slow.set()
    words = {"".join(c.choices[0].delta.content or "" for c in stream) for stream in streams}
    assert len(words) == 1


def test_the_answer_timeout_returns_504(engine, slow):
    with (
        running(application(Unclosed(engine), ServingConfig("pocket", answer_timeout=0.3))) as place,
        client_of(place) as client,
    ):
        with pytest.raises(openai.InternalServerError, match=r"not done within 0.3 seconds") as late:
            ask(client)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"not done within 0.3 seconds"):
            list(ask(client, stream=True))
        wait_for(lambda: engine.load().writing == 0)


class Unclosed:
    """An engine that outlives the server in front of it."""

    def __init__(self, engine: Engine) -> None:
        self.answer, self.load, self.ready = engine.answer, engine.load, engine.ready

    async def close(self, finish_within: float = 0.0) -> None:
        pass


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_failed_step_returns_500(engine, client, error, monkeypatch):
    ask(client, max_tokens=2)  # so that there is a decoder
    decoder = engine.worker.queue.decoder

    def failing():
        raise error("secret of the house")

    monkeypatch.setattr(decoder, "step", failing)
    with pytest.raises(openai.InternalServerError, match="the model failed") as failed:
        ask(client)
    assert failed.value.status_code == 500 and "secret" not in str(failed.value)
    monkeypatch.undo()
    assert ask(client).choices[0].finish_reason == "stop"


def poisoned(formed):
    return formed._replace(vectors=formed.vectors * float("nan"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_non_finite_answer_returns_500_and_fails_alone(engine, client, stream, monkeypatch, caplog):
    expected = ask(client, seed=1).choices[0].message.content
    form = engine.model.memory.form
    monkeypatch.setattr(engine.model.memory, "form", lambda *given: poisoned(form(*given)))
    with pytest.raises(openai.APIError, match="NaN or infinite") as failed:
        found = ask(client, stream=stream, extra_body={"vismem": {"invocation": "long@2"}})
        list(found)
    assert failed.value.code == "non_finite" and "its long-term memory is not finite" in caplog.text
    monkeypatch.undo()
    assert ask(client, seed=1).choices[0].message.content == expected


def test_stopping_lets_answers_finish(model):
    engine = Engine(model, batch_size=2)
    bound = listening_socket("127.0.0.1", 0)
    server = Server(config_of(application(engine, ServingConfig("pocket")), grace=BOUND))
    thread = threading.Thread(target=serve, args=(server, bound))
    thread.start()
    with client_of(address_of(bound)) as client:
        stream = ask(client, stream=True)
        first = next(iter(stream))
        server.handle_exit(2, None)
        rest = list(stream)
        assert first.choices[0].delta.role == "assistant" and rest[-1].choices[0].finish_reason == "stop"
    thread.join(BOUND)
    assert not thread.is_alive() and not engine.worker.alive and not engine.ready()


def test_stopping_cancels_long_answers(model, monkeypatch):
    engine = Engine(model, batch_size=2)
    step = engine.worker.queue.step
    monkeypatch.setattr(engine.worker.queue, "step", lambda: (time.sleep(0.2), step())[1])
    bound = listening_socket("127.0.0.1", 0)
    server = Server(config_of(application(engine, ServingConfig("pocket")), grace=1))
    thread = threading.Thread(target=serve, args=(server, bound))
    thread.start()
    with client_of(address_of(bound)) as client:
        stream = ask(client, stream=True)
        next(iter(stream))
        server.handle_exit(2, None)
        seen: list = []
        with suppress(openai.APIError, httpx.TransportError):  # it may be told of its end, or cut off
            seen.extend(chunk for chunk in stream)
        assert not any(choice.finish_reason for chunk in seen for choice in chunk.choices)
    thread.join(BOUND)
    assert not thread.is_alive() and not engine.worker.alive


def test_a_port_in_use_raises():
    with (
        listening_socket("127.0.0.1", 0) as bound,
        pytest.raises(ValueError, match=r"cannot listen on 127.0.0.1, port"),
    ):
        listening_socket("127.0.0.1", bound.getsockname()[1])
