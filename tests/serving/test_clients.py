"""What real clients send: answers as history, extra fields of front ends, and messages to continue."""

from __future__ import annotations

import base64
import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving_clients import BOUND, JSON, QUESTION, SHELF, ask, client_of, own, running, uri, user

from vismem.serving import protocol
from vismem.serving.engine import Engine
from vismem.serving.protocol import ChatRequest
from vismem.serving.server import ServingConfig, application

TURN = {"role": "user", "content": "Read row 2."}


@pytest.fixture(scope="module")
def address(model):
    engine = Engine(model, batch_size=4, max_waiting=6, max_tokens=200)
    with running(application(engine, ServingConfig("pocket", answer_timeout=BOUND))) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with client_of(address) as found:
        yield found


def posted(address: str, body: dict) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", content=json.dumps(body), headers=JSON, timeout=BOUND)


# Answers as history.

ANSWERS = {
    "plain": {},
    "stopped": {"stop": ["So"]},
    "cut": {"max_tokens": 3},
    "empty": {"stop": ["R"], "extra_body": {"vismem": {"invocation": "off"}}},
    "choices": {"n": 2, "temperature": 1.0, "max_tokens": 8},
    "log-probabilities": {"logprobs": True, "top_logprobs": 2, "max_tokens": 5},
    "scheduled": {"max_tokens": 5, "extra_body": {"vismem": {"invocation": "short@0,long@2"}}},
    "no trace": {"max_tokens": 5, "extra_body": {"vismem": {"trace": False}}},
}


def as_langchain(message) -> dict:
    """What LangChain's chat model makes of an answer, and sends."""
    found = {"role": "assistant", "content": message.content}
    if message.refusal:
        found["refusal"] = message.refusal
    return found


def as_litellm(message) -> dict:
    """LiteLLM's message, dumped."""
    more = {"tool_calls": None, "function_call": None, "annotations": [], "reasoning_content": None, "audio": None}
    return {"content": message.content, "role": "assistant", **more, "provider_specific_fields": {"refusal": None}}


def as_parts(message) -> dict:
    """The words as parts, as LlamaIndex and the Responses API write them."""
    part = {"type": "output_text", "text": message.content, "annotations": [], "logprobs": None}
    return {"role": "assistant", "content": [part] if message.content else [], "id": "msg_1", "status": "completed"}


FORMS = {
    "object": lambda message: message,
    "model_dump": lambda message: message.model_dump(),
    "to_dict": lambda message: message.to_dict(),
    "without null": lambda message: message.model_dump(exclude_none=True),
    "json": lambda message: json.loads(message.model_dump_json()),
    "langchain": as_langchain,
    "litellm": as_litellm,
    "parts": as_parts,
}


def reassembled(client, *turns, **settings):
    """What the client's own helper makes of a stream."""
    with client.chat.completions.stream(model="pocket", messages=list(turns), **settings) as stream:
        for _ in stream:
            pass
        return stream.current_completion_snapshot


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_can_be_sent_back_as_history(client, kind):
    first = user("Read row 1.", SHELF) if kind == "scheduled" else user("Read row 1.")
    whole = ask(client, first, seed=3, **ANSWERS[kind])
    streamed = reassembled(client, first, seed=3, **ANSWERS[kind])
    texts = [[choice.message.content or "" for choice in found.choices] for found in (whole, streamed)]
    assert texts[0] == texts[1] and (texts[0] == [""]) == (kind == "empty")
    turns = [
        form(message)
        for message in (whole.choices[-1].message, streamed.choices[-1].message)
        for form in FORMS.values()
    ]
    with ThreadPoolExecutor(4) as pool:  # as many as the batch has rows
        found = list(pool.map(lambda turn: ask(client, user("Read row 1."), turn, TURN, seed=0, max_tokens=4), turns))
    assert len({(each.choices[0].message.content, each.usage.prompt_tokens) for each in found}) == 1  # as one history


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []},
        {"function_call": {"name": "", "arguments": ""}, "tool_calls": None, "audio": {}, "images": []},
        {"name": None, "vismem": {"invocations": []}, "reasoning_content": "because", "reasoning": None},
        {"annotations": [{"type": "url_citation", "url_citation": {}}], "parsed": None, "weight": 1},
        {"content": [{"type": "text", "text": "Row"}, {"type": "text", "text": " 1."}], "tool_calls": {}},
        {"content": [{"type": "refusal", "refusal": "Row 1."}]},
        {"content": ["Row 1."]},
        {"content": None, "refusal": "Row 1."},
        {"content": "", "refusal": "Row 1."},
        {"content": [], "refusal": "Row 1."},
    ],
)
def test_openais_assistant_fields_are_accepted(client, address, more):
    plain = ask(client, user("Hi."), {"role": "assistant", "content": "Row 1."}, TURN, seed=0, max_tokens=6)
    turn = {"role": "assistant", "content": "Row 1.", **more}
    body = {"model": "pocket", "messages": [user("Hi."), turn, TURN], "seed": 0, "max_tokens": 6}
    found = posted(address, body)
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["message"]["content"] == plain.choices[0].message.content
    assert found.json()["usage"]["prompt_tokens"] == plain.usage.prompt_tokens


@pytest.mark.parametrize(
    "turn", [{"content": None}, {"content": ""}, {}, {"content": []}, {"content": [], "refusal": ""}]
)
def test_empty_assistant_messages_are_accepted(address, turn):
    body = {"model": "pocket", "messages": [TURN, {"role": "assistant", **turn}, TURN], "max_tokens": 3}
    assert posted(address, body).status_code == 200


# Fields of front ends.

EVERY_NULL = dict.fromkeys(name for name in ChatRequest.model_fields if name not in ("model", "messages"))
NEUTRAL = {
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "function_call": "auto",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": {},
    "logit_bias": {},
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "best_of": 1,
    "use_beam_search": False,
    "min_tokens": 0,
    "stop_token_ids": [],
    "echo": False,
    "guided_json": None,
    "structured_outputs": {"json": None},
    "stop": [],
    "stream": False,
    "stream_options": {"include_usage": None},
    "top_logprobs": 0,
    "n": 1.0,
    "max_tokens": 3.0,
}
OPEN_WEBUI = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "chat_id": "6c1f",
    "id": "0b5a",
    "session_id": "s",
    "filter_ids": [],
    "tool_servers": [],
    "features": {"web_search": False, "image_generation": False},
    "variables": {"{{USER_NAME}}": "Ada"},
    "model_item": {"id": "pocket", "object": "model"},
    "background_tasks": {"title_generation": True},
    "keep_alive": "5m",
    "num_ctx": 4096,
    "metadata": {"user_id": "u", "files": None},
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "seed": -1,
    "stop": ["<end>"],
    "function_calling": "native",
}
LIBRECHAT = {
    "stream": True,
    "user": "65f0",
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "stop": ["||>", "\nUser:"],
    "reasoning_effort": "medium",
    "max_tokens": None,
    "promptPrefix": None,
    "resendFiles": True,
}
LITELLM = {
    "temperature": None,
    "metadata": {"requester_metadata": {}},
    "litellm_session_id": "x",
    "extra_headers": None,
    "stream_options": None,
    "parallel_tool_calls": None,
    "thinking": {"type": "disabled"},
    "drop_params": True,
    "user": None,
}
BODIES = {
    "every optional field null": EVERY_NULL,
    "everything neutral": NEUTRAL,
    "open webui": OPEN_WEBUI,
    "librechat": LIBRECHAT,
    "litellm": LITELLM,
    "langchain": {"n": 1, "stream": False, "temperature": 0.7, "logit_bias": None, "model_kwargs": {}},
    "llamaindex": {"temperature": 0.1, "max_tokens": 3, "timeout": 60, "stream": False, "reasoning_effort": None},
    "vercel ai sdk": {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "verbosity": "low"},
    "continue": {"stream": True, "max_tokens": 3, "stop": ["<|im_end|>"], "prediction": None, "top_k": 0},
    "lmms-eval": {"max_tokens": 3, "temperature": 0, "response_format": {"type": "text"}},
    "vllm": {
        "min_p": 0.1,
        "top_k": -1,
        "repetition_penalty": 1.1,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": True,
        "continue_final_message": False,
        "ignore_eos": False,
        "min_tokens": 0,
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
        "priority": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "mm_processor_kwargs": None,
        "request_id": "r",
        "cache_salt": "s",
    },
    "sglang": {"regex": None, "ebnf": None, "json_schema": None, "separate_reasoning": True, "lora_path": None},
    "openai today": {
        "store": True,
        "metadata": {},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "verbosity": "medium",
        "web_search_options": None,
    },
    **{f"seed {seed}": {"seed": seed, "temperature": 1} for seed in (-1, -2, 0, -(2**63), 2**63 - 1, None)},
    **{f"choices from seed {seed}": {"seed": seed, "temperature": 1, "n": 3} for seed in (-2, 2**63 - 1)},
    **{f"chance from seed {seed}": {"seed": seed, "vismem": {"invocation": "random:0.5"}} for seed in (-7, 2**63 - 1)},
    **{f"top_k {k}": {"top_k": k, "temperature": 1} for k in (-1, 0, 1, 10**6, 5.0, None)},
    **{f"top_p {p}": {"top_p": p} for p in (0, 1, 1.0, 1e-9)},
    **{f"min_p {p}": {"min_p": p} for p in (0, 0.5, 1)},
    **{f"temperature {t}": {"temperature": t} for t in (0, 0.0, 1e-9, 2)},
    **{f"stop {stop}": {"stop": stop} for stop in ("x", [], [None], ["x", None], None)},
    "vismem null": {"vismem": None},
    "vismem of nulls": {"vismem": {"invocation": None, "trace": None, "colour": "red"}},
    "penalty without drawing": {"repetition_penalty": 1.2, "temperature": 0},
    "ends ignored": {"ignore_eos": True},
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_clients_are_answered(address, name):
    body = {"model": "pocket", "messages": [user("Hello.")], "max_tokens": 3}
    body.update({field: value for field, value in BODIES[name].items() if (field, value) != ("max_tokens", None)})
    found = posted(address, body)
    assert found.status_code == 200, found.text
    assert '"error"' not in found.text


PICTURE = uri(SHELF)
PART = {"type": "text", "text": "Read row 1."}
SHOWN = {
    "object": {"type": "image_url", "image_url": {"url": PICTURE}},
    "string": {"type": "image_url", "image_url": PICTURE},
    "nulls": {"type": "image_url", "text": None, "image_url": {"url": PICTURE, "detail": None}, "uuid": None},
    "detail": {"type": "image_url", "image_url": {"url": PICTURE, "detail": "extreme", "format": "image/png"}},
    "responses": {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
    "cache": {"type": "image_url", "image_url": {"url": PICTURE}, "cache_control": {"type": "ephemeral"}},
    "octets": {"type": "image_url", "image_url": PICTURE.replace("image/png", "application/octet-stream")},
    "no type": {"type": "image_url", "image_url": {"url": PICTURE.replace("image/png", "")}},
    "no label": {"type": "image_url", "image_url": {"url": PICTURE.replace("image/png;base64", "")}},
    "blanks around it": {"type": "image_url", "image_url": f" \n{PICTURE}\n"},
    "unpadded": {"type": "image_url", "image_url": {"url": PICTURE.rstrip("=")}},
}


@pytest.mark.parametrize("form", SHOWN)
def test_every_form_of_image_part_is_accepted(client, form):
    wanted = ask(client, user("Read row 1.", SHELF), seed=0, max_tokens=12)
    found = ask(client, {"role": "user", "content": [SHOWN[form], PART]}, seed=0, max_tokens=12)
    assert found.choices[0].message.content == wanted.choices[0].message.content
    assert found.usage == wanted.usage


def test_the_media_type_of_an_image_is_ignored(client):
    held = io.BytesIO()
    SHELF.save(held, format="webp", lossless=True)
    url = "data:application/pdf;base64," + base64.urlsafe_b64encode(held.getvalue()).decode().rstrip("=")
    turn = {"role": "user", "content": [{"type": "image_url", "image_url": url}, PART]}
    wanted = ask(client, user("Read row 1.", SHELF), seed=0, max_tokens=12)
    assert ask(client, turn, seed=0, max_tokens=12).choices[0].message.content == wanted.choices[0].message.content


def test_unknown_fields_are_logged_once_each(address, monkeypatch, caplog):
    monkeypatch.setattr(protocol, "unknown_fields", set())
    body = {"model": "pocket", "messages": [{**TURN, "mood": "good"}], "max_tokens": 1, "shelf\n": "secret"}
    with caplog.at_level(logging.WARNING, "vismem"):
        for _ in range(3):
            assert posted(address, body).status_code == 200
    assert [record.getMessage() for record in caplog.records] == [
        "ignoring the unknown field 'shelf\\n' of a request for chat completions",
        "ignoring the unknown field 'mood' of a message",
    ]


def test_the_number_of_logged_unknown_fields_is_limited(monkeypatch, caplog):
    monkeypatch.setattr(protocol, "unknown_fields", set())
    monkeypatch.setattr(protocol, "MAX_UNKNOWN_FIELDS", 5)
    with caplog.at_level(logging.WARNING, "vismem"):
        for at in range(1000):
            protocol.log_unknown_field(f"{at}" * 1000, "a request")
    assert len(caplog.records) == 6 and caplog.records[-1].getMessage().startswith("ignoring more unknown fields")
    assert sum(map(len, protocol.unknown_fields)) < 1000


# How tokens are drawn.


def test_min_p_equals_generate(client, model):
    said = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    texts = set()
    for least in (0.0, 0.5, 1.0):
        text, _ = own(model, said, seed=5, min_p=least, do_sample=True, temperature=1.8, max_new_tokens=10)
        found = ask(client, user(QUESTION), seed=5, temperature=1.8, max_tokens=10, extra_body={"min_p": least})
        assert found.choices[0].message.content == text
        texts.add(text)
    assert len(texts) == 3


@pytest.mark.parametrize("off", [-1, 0])
def test_top_k_off_means_all_tokens(client, model, monkeypatch, off):
    monkeypatch.setattr(model.base.generation_config, "top_k", 1)
    text, _ = own(model, seed=2, do_sample=True, temperature=1.8, top_k=0, max_new_tokens=16)
    found = ask(client, seed=2, temperature=1.8, max_tokens=16, extra_body={"top_k": off})
    assert found.choices[0].message.content == text
    assert ask(client, seed=2, temperature=1.8, max_tokens=16).choices[0].message.content != text


def test_neutral_truncation_keeps_greedy_decoding(client):
    wanted = ask(client, seed=0).choices[0].message.content
    neutral = {"top_k": -1, "min_p": 0, "top_p": 1}
    assert {ask(client, seed=seed, extra_body=neutral).choices[0].message.content for seed in range(4)} == {wanted}


def test_negative_and_positive_seeds_reproduce(client, model):
    settings = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    for seed in (-2, -(2**63), 2**63 - 1):
        text, _ = own(model, seed=seed, **settings)
        found = ask(client, seed=seed, temperature=1.5, max_tokens=12)
        assert found.choices[0].message.content == text and found.vismem["seed"] == seed
    drawn = {ask(client, seed=-1, max_tokens=1).vismem["seed"] for _ in range(3)}
    assert len(drawn) == 3 and min(drawn) >= 0


def test_ignore_eos_generates_until_max_tokens(client):
    short = ask(client, max_tokens=100)
    found = ask(client, max_tokens=100, extra_body={"ignore_eos": True})
    assert (short.choices[0].finish_reason, found.choices[0].finish_reason) == ("stop", "length")


# Replies that are begun for the model.

CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize("begun", ["Row 1: 2 red,", "Row 1:", "Row", "Row 1: 2 red, "])
@pytest.mark.parametrize("more", [CONTINUED, {"continue_final_message": True}])
def test_continue_final_message_continues_the_last_message(client, model, begun, more):
    turns = [user(QUESTION, SHELF), {"role": "assistant", "content": begun}]
    found = ask(client, *turns, seed=0, max_tokens=20, extra_body=more)
    shown = [{"type": "image", "image": SHELF}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    processor = model.processor
    text = processor.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text.endswith(begun)
    inputs = processor(text=text, images=[[SHELF]], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=20, seed=[0])
    new = out[0, inputs["input_ids"].shape[1] :]
    assert found.choices[0].message.content == processor.decode(new, skip_special_tokens=True)
    assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]
    pieces = ask(client, *turns, seed=0, max_tokens=20, extra_body=more, stream=True)
    streamed = "".join(choice.delta.content or "" for chunk in pieces for choice in chunk.choices)
    assert streamed == found.choices[0].message.content


def test_a_message_of_several_parts_is_continued_at_its_end(client):
    parts = [{"type": "text", "text": "Row 1:"}, {"type": "text", "text": " 2 red,"}, {"type": "text", "text": ""}]
    wanted = ask(
        client, user(QUESTION, SHELF), {"role": "assistant", "content": "Row 1: 2 red,"}, seed=0, extra_body=CONTINUED
    )
    found = ask(client, user(QUESTION, SHELF), {"role": "assistant", "content": parts}, seed=0, extra_body=CONTINUED)
    assert found.choices[0].message == wanted.choices[0].message and found.usage == wanted.usage


@pytest.mark.parametrize("begun", ["", None, []])
def test_continuing_an_empty_message_starts_a_new_one(client, begun):
    wanted = ask(client, seed=0)
    found = ask(client, user(QUESTION, SHELF), {"role": "assistant", "content": begun}, seed=0, extra_body=CONTINUED)
    assert found.choices[0].message == wanted.choices[0].message and found.usage == wanted.usage


def test_by_default_a_last_assistant_message_is_history(client):
    turns = [user(QUESTION, SHELF), {"role": "assistant", "content": "Row 1:"}]
    plain = ask(client, *turns, seed=0, max_tokens=4)
    assert plain.usage == ask(client, *turns, seed=0, max_tokens=4, extra_body={"continue_final_message": False}).usage
    continued = ask(client, *turns, seed=0, max_tokens=4, extra_body=CONTINUED)
    bare = ask(client, *turns, seed=0, max_tokens=4, extra_body={"add_generation_prompt": False})
    counts = [found.usage.prompt_tokens for found in (continued, bare, plain)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("turns", "more", "message"),
    [
        ([TURN], CONTINUED, "needs an assistant message last, not one of role user"),
        (
            [TURN, {"role": "assistant", "content": "Row"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message needs add_generation_prompt: false",
        ),
        ([TURN, {"role": "assistant", "content": "Row <ms_I>"}], CONTINUED, "the reserved token <ms_I>"),
    ],
)
def test_messages_that_cannot_be_continued_are_refused(client, turns, more, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, *turns, extra_body=more)
