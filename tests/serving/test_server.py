"""The whole server: its OpenAPI schema, the command, and hostile clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import openai
import pytest
import schemathesis
from forked import Forked
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_clients import BOUND, JSON, QUESTION, SHELF, ask, client_of, user, wait_for

from vismem.cli import main
from vismem.loading import load_model
from vismem.serving import page
from vismem.serving.access import RequestLog
from vismem.serving.connections import ConnectionLimits
from vismem.serving.engine import Engine
from vismem.serving.guards import guarded, hosts_for
from vismem.serving.lifespan import Server, address_of, config_of, listening_socket, serve
from vismem.serving.metrics import Metrics
from vismem.serving.server import ServingConfig, application

KEY = "open-sesame"


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, batch_size=8, max_waiting=8, max_tokens=60)


@pytest.fixture(scope="module")
def address(engine):
    """The server as `vismem serve` puts it together."""
    metrics = Metrics(engine.load)
    app = application(engine, ServingConfig("pocket", answer_timeout=BOUND, requires_key=True), metrics)
    safe = guarded(app, keys=[KEY], hosts=hosts_for("127.0.0.1"), max_body=2**20, body_timeout=2)
    limits = ConnectionLimits(head=2, write=2, connections=150, on_drop=metrics.count_drop)
    server = Server(config_of(RequestLog(safe, metrics), 5, limits))
    bound = listening_socket("127.0.0.1", 0)
    thread = threading.Thread(target=serve, args=(server, bound))
    thread.start()
    yield address_of(bound)
    server.should_exit = True
    thread.join(BOUND)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(address):
    with client_of(address).with_options(api_key=KEY) as found:
        yield found


def operations(address: str) -> dict:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=BEARER)
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


BEARER = {"Authorization": f"Bearer {KEY}"}
CHAT = "POST /v1/chat/completions"
# A schema cannot know what only the model can tell (not a picture, too long a prompt), so the model is left out.
EXCLUDED = [positive_data_acceptance]


@pytest.mark.parametrize(
    ("label", "examples"),  # a page that takes no arguments has few requests to tell apart
    [
        (CHAT, 60),
        ("GET /v1/models", 10),
        ("GET /v1/models/{name}", 30),
        ("GET /health", 10),
        ("GET /metrics", 10),
    ],
)
def test_valid_requests_follow_the_openapi_schema(address, label, examples):
    found = operations(address)
    assert len(found) == 5
    run_through(found[label], schemathesis.GenerationMode.POSITIVE, examples)


def test_requests_outside_the_openapi_schema_are_refused(address):
    run_through(operations(address)[CHAT], schemathesis.GenerationMode.NEGATIVE, 80)


def run_through(operation, mode, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(headers=BEARER, excluded_checks=EXCLUDED)

    check()


def test_wrong_and_missing_keys_are_refused(address):
    for key, message in [("wrong", "not one of this server's"), (KEY + "x", "not one of this server's")]:
        with (
            client_of(address).with_options(api_key=key) as client,
            pytest.raises(openai.AuthenticationError, match=message),
        ):
            ask(client)
    assert httpx.get(f"{address}/v1/models").status_code == httpx.get(f"{address}/metrics").status_code == 401
    assert httpx.get(f"{address}/health").status_code == 200
    described = httpx.get(f"{address}/openapi.json", headers=BEARER).json()
    assert described["security"] == [{"key": []}] and described["paths"]["/health"]["get"]["security"] == []


def test_bodies_and_images_that_are_too_large_are_refused(address, client):
    with pytest.raises(openai.APIStatusError, match="1048576 bytes, the limit") as refused:
        ask(client, {"role": "user", "content": "x" * 2**20})
    assert refused.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match="9 images; this server takes at most 8") as refused:
        ask(client, user(QUESTION, *[SHELF] * 9))
    assert refused.value.status_code == 413
    for url, message in [
        ("https://example.org/a.png", "does not fetch images from there"),
        ("file:///etc/passwd", "data URI|http"),
        ("data:image/png;base64,AAAA", "cannot be used"),
    ]:
        turn = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        with pytest.raises(openai.APIStatusError, match=message) as refused:
            ask(client, turn)
        assert refused.value.status_code in (400, 403)


def test_text_beyond_the_context_is_not_tokenized(address, client, engine, monkeypatch):
    monkeypatch.setattr(engine, "_encode", lambda *given: 1 / 0)
    with pytest.raises(openai.BadRequestError, match="900000 characters") as refused:
        ask(client, {"role": "user", "content": "1" * 900_000})
    assert refused.value.code == "context_length_exceeded"


def test_the_length_of_schedules_is_limited(client):
    for count, ends in ((64, False), (65, True)):
        plan = {"vismem": {"invocation": ",".join(["long@900"] * count)}}
        if ends:
            with pytest.raises(openai.BadRequestError, match="may have at most 64 invocations, not 65"):
                ask(client, user("Hello."), max_tokens=2, extra_body=plan)
        else:
            assert ask(client, user("Hello."), max_tokens=2, extra_body=plan).choices


def test_random_policies_use_seed_plus_n(client):
    def tried(**settings):
        found = ask(
            client, user(QUESTION, SHELF), extra_body={"vismem": {"invocation": "random:0.5@anywhere"}}, **settings
        )
        return [(each.message.content, each.vismem["invocations"]) for each in found.choices]

    both = tried(n=2, seed=5, temperature=1, max_tokens=20)
    assert both == tried(seed=5, temperature=1, max_tokens=20) + tried(seed=6, temperature=1, max_tokens=20)
    assert both[0] != both[1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("messages", [], "messages: is empty"),
        ("messages", [{"role": "user", "content": None}], "messages.0.content: must be a string or a list of parts"),
        ("messages", [{"role": "user", "content": 5}], "messages.0.content: must be a string or a list of parts"),
        ("stop", "", "stop: is empty"),
    ],
)
def test_common_mistakes_have_clear_messages(address, field, value, message):
    body = {"model": "pocket", "messages": [user("Hello.")], field: value}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, headers=BEARER, timeout=BOUND)
    assert answer.status_code == 400 and answer.json()["error"]["message"] == message


def test_recent_openai_fields_are_accepted(client):
    told = {"safety_identifier": "somebody", "prompt_cache_key": "a"}
    assert ask(client, user("Hello."), max_tokens=2, **told).choices


def test_max_body_also_limits_images(monkeypatch):
    from vismem.cli import serve as command

    monkeypatch.setattr(command, "load", lambda options: load_model())
    for told, most in (("200", 200), ("8", 64)):
        engine = command.engine_of(command.parse(["--max-body", told]))
        asyncio.run(engine.close())
        assert engine.pictures.limits.total_size == most * 2**20


def test_path_traversal_is_refused(address):
    host = address.removeprefix("http://")
    for path in [
        "/v1/models/../../etc/passwd",
        "//v1/models",
        "/v1/models/%2e%2e%2fetc",
        "/%00",
        "/v1/models?x=" + "y" * 9000,
    ]:
        connection = http.client.HTTPConnection(host, timeout=BOUND)
        connection.request("GET", path, headers=BEARER)
        answer = connection.getresponse()
        assert answer.status in (200, 404) and b"root:" not in answer.read()
        connection.close()


def test_two_hundred_connections_at_once_are_answered_or_refused(engine, address, client):
    """Slow, silent, hasty and wrong ones: those that ask properly are answered or told to retry."""
    host, port = address.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=BOUND) for _ in range(60)]
    for number, each in enumerate(idle):
        if number % 2:
            each.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
    body = {"model": "pocket", "messages": [user(QUESTION, SHELF)], "max_tokens": 12}

    def one(number: int) -> int:
        try:
            with httpx.Client(timeout=BOUND, headers=BEARER | JSON) as own:
                if number % 10 == 3:
                    return own.post(f"{address}/v1/chat/completions", content=b'{"model": ').status_code
                if number % 10 == 7:  # goes away in the middle
                    with own.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}) as found:
                        next(found.iter_raw(), None)
                        return found.status_code
                return own.post(f"{address}/v1/chat/completions", json=body).status_code
        except httpx.TransportError:
            return 0  # turned away before the request was read

    with ThreadPoolExecutor(140) as pool:
        found = list(pool.map(one, range(140)))
    assert set(found) <= {0, 200, 400, 429, 503} and found.count(200) >= 8 and found.count(400) >= 1
    wait_for(lambda: engine.load().writing == engine.load().waiting == 0)
    for each in idle:  # those that never said anything whole are cut off
        each.settimeout(BOUND)
        while each.recv(4096):
            pass
        each.close()
    assert ask(client, max_tokens=2).choices[0].finish_reason == "length"
    counts = httpx.get(f"{address}/metrics", headers=BEARER).text
    assert 'vismem_refused_total{reason="slow_head"}' in counts and "vismem_rows_writing 0.0" in counts


def test_pages_for_browsers_load_nothing_and_need_the_key(address):
    for path, words in (
        ("/", ["VisMem", "pocket:vanilla", "/v1/chat/completions", "/docs"]),
        ("/docs", ["min_p", "/v1"]),
        ("/docs/", ["min_p", "/v1"]),
    ):
        assert httpx.head(address + path, headers=BEARER).status_code == 200
        assert httpx.get(address + path).status_code == 401
        found = httpx.get(address + path, headers=BEARER)
        assert found.status_code == 200 and found.headers["content-type"].startswith("text/html")
        assert found.headers["content-security-policy"].startswith("default-src 'none'")
        assert all(word in found.text for word in words)
        assert not re.search("<script|<img|<link|https?://", found.text)
        assert all(httpx.get(address + link, headers=BEARER).status_code == 200 for link in links(found.text))


def links(page: str) -> list[str]:
    return re.findall("href=[\"']([^\"']+)", page)


def test_model_names_are_escaped_on_the_page(engine):
    found = page.home(["<b>a</b>"], application(engine, ServingConfig("<b>a</b>")).openapi())
    assert "<b>" not in found.body.decode() and "&lt;b&gt;a" in found.body.decode()


def test_the_access_log_has_the_token_counts(engine):
    app, lines = application(engine, ServingConfig("pocket")), []

    async def told(body: dict) -> str:
        content = json.dumps(body).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions"}
        scope |= {"query_string": b"", "headers": head, "state": {}}
        coming = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict:
            return coming.pop() if coming else await asyncio.Event().wait()

        async def send(message: dict) -> None:
            pass

        await RequestLog(app, Metrics(engine.load), lines.append)(scope, receive, send)
        return lines[-1]

    async def both() -> None:
        body = {"model": "pocket", "messages": [user("Hello.")], "max_tokens": 2, "vismem": {"invocation": "off"}}
        for more in ({}, {"stream": True}):
            assert re.search(r" 200 \d+\.\d{3}s \d+\+2 tokens$", await told({**body, **more}))
        assert re.search(r" 400 \d+\.\d{3}s$", await told({**body, "temperature": 9}))

    asyncio.run(both())


# The command.


@contextmanager
def started(*options: str, **environment: str) -> Iterator[tuple[Forked, str]]:
    """`vismem serve` in a process of its own, and its address."""
    with Forked(main, ["serve", "--port", "0", *options], **environment) as process:
        line = process.stdout.readline()
        assert line.startswith("Serving "), line + process.stderr.read()
        yield process, line.split(" on ")[1].split("/v1")[0]


@pytest.mark.parametrize("logged", [True, False])
def test_the_command_serves_until_a_signal(tmp_path, logged):
    (tmp_path / "keys").write_text("# ours\nfirst\nsecond\n")
    options = ["--name", "shelves", "--api-key-file", str(tmp_path / "keys"), "--invocation", "off"]
    options += [] if logged else ["--no-access-log"]
    with started(*options, VISMEM_API_KEY="third") as (process, place):
        for key in ("first", "second", "third"):
            with client_of(place).with_options(api_key=key) as client:
                found = ask(client, model="shelves", max_tokens=8)
                assert found.vismem["invocation"] == "off"
                line = process.stdout.readline() if logged else ""
                assert bool(re.search(r" POST /v1/chat/completions 200 \d+\.\d{3}s \d+\+8 tokens$", line)) == logged
        with client_of(place) as client, pytest.raises(openai.AuthenticationError):
            ask(client, model="shelves")
        with httpx.Client(headers={"Host": "evil.example"}) as rebound:
            assert rebound.get(f"{place}/health").status_code == 403
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND) == 0
        rest, errors = process.rest()
        assert errors == ""
        assert [line.split()[2:5] for line in rest.splitlines()] == (
            [["POST", "/v1/chat/completions", "401"], ["GET", "/health", "403"]] if logged else []
        )


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_second_signal_ends_the_command_at_once():
    body = json.dumps({"model": "pocket", "messages": [{"role": "user", "content": "Hello"}], "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        process, place = stack.enter_context(started("--batch-size", "1", "--grace", str(BOUND)))
        host, port = place.removeprefix("http://").split(":")
        raw = [stack.enter_context(socket.create_connection((host, int(port)), timeout=BOUND)) for _ in range(30)]
        for each in raw[1:]:
            each.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        raw[0].sendall(head + b"Content-Length: 9\r\n\r\n{")  # and no more, so that there is something to wait for
        assert b"200 OK" in raw[1].recv(64)
        process.send_signal(signal.SIGTERM)
        assert process.wait(1) is None
        process.send_signal(signal.SIGINT)
        assert process.wait(BOUND / 2) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--port", "70000"], 2, "from 0 to 65535"),
        (["--max-pixels", "179"], 2, "from 1 to 178"),  # Pillow would refuse it, and name another limit
        (["--max-tokens", "1000001"], 2, "from 1 to 1000000"),
        (["--invocation", "often"], 2, "unknown policy 'often'"),
        (["--replica-gpus", "1"], 2, "give --replicas too"),
        (["--api-key", ""], 1, "empty"),
        (["--api-key-file", "no-such-file"], 1, "cannot read API keys from no-such-file"),
        (["--host", "256.1.1.1"], 1, "cannot listen on 256.1.1.1"),
        (["--base", "no-such-folder"], 1, "no base no-such-folder"),
    ],
)
def test_invalid_options_get_a_one_line_error(capsys, options, code, message):
    assert main(["serve", "--port", "0", *options]) == code
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_a_port_in_use_is_an_error(capsys):
    with listening_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
