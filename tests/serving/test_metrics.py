"""The server's metrics, parsed as Prometheus parses them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from loopback import connected, exchanged, get, listening, post, response, until
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from vismem.serving.access import RequestLog
from vismem.serving.connections import ConnectionLimits, uvicorn_settings
from vismem.serving.engine import Load
from vismem.serving.errors import ApiError
from vismem.serving.guards import guarded
from vismem.serving.metrics import Metrics
from vismem.serving.protocol import (
    ChatChunk,
    ChunkChoice,
    Delta,
    InvocationTrace,
    MemoryUsage,
    Trace,
    Usage,
)


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """All values, by name and values of labels, in the order of the labels' names."""
    content, kind = metrics.render()
    assert kind.startswith("text/plain")
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def idle() -> Load:
    return Load(0, 0)


USAGE = Usage(
    prompt_tokens=30,
    completion_tokens=12,
    total_tokens=42,
    memory=MemoryUsage(invocation_tokens=4, short_vectors=8, long_vectors=8),
)


def chunk(index: int, **choice: object) -> ChatChunk:
    choices = [ChunkChoice(index=index, **{"delta": Delta(), **choice})]
    return ChatChunk(id="one", created=0, model="pocket", choices=choices, usage=USAGE)


def text(index: int, content: str) -> ChatChunk:
    return chunk(index, delta=Delta(content=content))


def invoked(index: int, kind: str, *, forced: bool) -> ChatChunk:
    trace = InvocationTrace(kind=kind, position=0, offset=0, length=8, forced=forced)
    return chunk(index, vismem=Trace(invocations=[trace]))


CHUNKS = [
    text(0, ""),
    text(1, ""),
    invoked(0, "short", forced=False),
    text(0, "a"),
    text(1, "b"),
    text(0, "c"),
    invoked(1, "long", forced=True),
    text(0, "d"),
    chunk(0, finish_reason="stop"),
    chunk(1, finish_reason="length"),
]


async def stream(*chunks: ChatChunk, error: BaseException | None = None, closed: list[bool] | None = None):
    try:
        for each in chunks:
            await asyncio.sleep(0)
            yield each
        if error is not None:
            raise error
    finally:
        if closed is not None:
            closed.append(True)


async def drained(chunks: AsyncIterator[ChatChunk]) -> list[ChatChunk]:
    async with aclosing(chunks) as each:
        return [chunk async for chunk in each]


def test_an_answers_tokens_times_and_memory_are_counted_and_its_chunks_unchanged() -> None:
    metrics = Metrics(idle)
    assert asyncio.run(drained(metrics.watch(stream(*CHUNKS)))) == CHUNKS
    found = read(metrics)
    tokens = {kind: found["vismem_tokens_total", kind] for kind in ("prompt", "completion", "invocation")}
    assert tokens == {"prompt": 30, "completion": 12, "invocation": 4}
    assert found["vismem_tokens_total", "short"] == found["vismem_tokens_total", "long"] == 8
    assert found["vismem_invocations_total", "false", "short"] == 1
    assert found["vismem_invocations_total", "true", "long"] == 1
    assert found["vismem_invocations_total", "false", "long"] == 0
    assert found[("vismem_time_to_first_token_seconds_count",)] == 1
    assert found[("vismem_inter_token_seconds_count",)] == 2  # of choice 0; choice 1 wrote once
    assert found[("vismem_answer_seconds_count",)] == 1
    assert found["vismem_answers_total", "done"] == 1


@pytest.mark.parametrize(
    "error, outcome",
    [
        (ApiError(504, "late"), "timeout"),
        (ApiError(429, "full"), "refused"),
        (ApiError(400, "wrong"), "refused"),
        (ApiError(503, "stopping"), "error"),
        (RuntimeError("broken"), "error"),
    ],
)
def test_failed_answers_are_counted_by_outcome(error: Exception, outcome: str) -> None:
    metrics = Metrics(idle)
    with pytest.raises(type(error)) as caught:
        asyncio.run(drained(metrics.watch(stream(CHUNKS[0], error=error))))
    assert caught.value is error
    found = read(metrics)
    outcomes = {name[1]: value for name, value in found.items() if name[0] == "vismem_answers_total"}
    assert outcomes == {**dict.fromkeys(["done", "cancelled", "timeout", "refused", "error"], 0), outcome: 1}
    assert found[("vismem_answer_seconds_count",)] == (outcome != "refused")  # or full queues looked like quick answers


def test_an_abandoned_answer_is_closed_and_counted_as_cancelled() -> None:
    metrics, closed = Metrics(idle), []

    async def left_early() -> None:
        async with aclosing(metrics.watch(stream(*CHUNKS, closed=closed))) as chunks:
            async for _ in chunks:
                break

    async def cancelled() -> None:
        async def waits():
            yield CHUNKS[0]
            await asyncio.Event().wait()

        task = asyncio.create_task(drained(metrics.watch(waits())))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(left_early())
    assert closed == [True]
    asyncio.run(cancelled())
    assert read(metrics)["vismem_answers_total", "cancelled"] == 2


def test_rows_are_read_when_the_metrics_are() -> None:
    now = [Load(3, 4)]
    metrics = Metrics(lambda: now[0])
    assert (read(metrics)[("vismem_rows_waiting",)], read(metrics)[("vismem_rows_writing",)]) == (3, 4)
    now[0] = Load(0, 1)
    assert (read(metrics)[("vismem_rows_waiting",)], read(metrics)[("vismem_rows_writing",)]) == (0, 1)


def test_applications_have_separate_metrics() -> None:
    one, other = Metrics(idle), Metrics(idle)
    one.count_drop("slow_head")
    assert read(one)["vismem_refused_total", "slow_head"] == 1
    assert read(other)["vismem_refused_total", "slow_head"] == 0


@pytest.fixture
def site():
    """A server with guards and counts; the counts, its port, and what holds its slow answers back."""
    free = threading.Event()

    async def echo(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    async def slow(request: Request) -> Response:
        while not free.is_set():
            await asyncio.sleep(0.01)
        return PlainTextResponse("at last")

    async def broken(request: Request) -> Response:
        raise RuntimeError("on purpose")

    routes = [
        Route("/v1/chat/completions", echo, methods=["POST"]),
        Route("/health", slow),
        Route("/v1/models", broken),
        Route("/v1/models/{name:path}", echo),
    ]
    metrics = Metrics(idle)
    app = RequestLog(guarded(Starlette(routes=routes), keys=["sk-right"], max_body=1000), metrics)
    with listening(app, **uvicorn_settings(ConnectionLimits(head=0.3, on_drop=metrics.count_drop))) as port:
        yield metrics, port, free
        free.set()


def test_requests_and_refusals_are_counted_by_route_method_and_status(site) -> None:
    metrics, port, _ = site
    key = "Authorization: Bearer sk-right"
    assert exchanged(port, post("/v1/chat/completions", b"{}", key))[0] == 200
    assert exchanged(port, post("/v1/chat/completions", b"{}"))[0] == 401
    assert exchanged(port, post("/v1/chat/completions", b"x" * 1001, key))[0] == 413
    assert exchanged(port, get("/v1/models/a/b?c=d", key))[0] == 200
    assert exchanged(port, get("/v1/models", key))[0] == 500
    assert exchanged(port, b"not HTTP\r\n\r\n")[0] == 400
    with connected(port) as raw:
        raw.sendall(b"GET /")
        assert response(raw)[0] == 408
    wanted = {
        ("POST", "/v1/chat/completions", "200"): 1,
        ("POST", "/v1/chat/completions", "401"): 1,
        ("POST", "/v1/chat/completions", "413"): 1,
        ("GET", "/v1/models/{name}", "200"): 1,
        ("GET", "/v1/models", "500"): 1,
    }
    until(lambda: of(metrics, "vismem_requests_total") == wanted)  # a client has its answer a moment before
    assert of(metrics, "vismem_refused_total") == {("key",): 1, ("too_large",): 1, ("bad_http",): 1, ("slow_head",): 1}


def of(metrics, counter: str) -> dict[tuple[str, ...], float]:
    """What was counted, by its labels."""
    return {name[1:]: value for name, value in read(metrics).items() if name[0] == counter and value}


def counted(metrics, each: int) -> None:
    """Waits until that many are counted: a client gets its answer a moment earlier."""
    names = [("vismem_requests_total", method, "other", "401") for method in ("GET", "other")]
    until(lambda: all(read(metrics).get(name) == each for name in names))


def test_clients_cannot_create_labels(site) -> None:
    metrics, port, _ = site
    for i in range(30):
        exchanged(port, get(f"/wp-admin/{i}"))
        exchanged(port, get(f"/v1/models/{i}", "Authorization: Bearer sk-right"))
        exchanged(port, get(f"/v1/models{i}").replace(b"GET", b"BREW%d" % i, 1))
    counted(metrics, 30)
    size = len(read(metrics))
    for i in range(30, 60):
        exchanged(port, get(f"/wp-admin/{i}"))
        exchanged(port, get(f"/v1/models/{i}", "Authorization: Bearer sk-right"))
        exchanged(port, get(f"/v1/models{i}").replace(b"GET", b"BREW%d" % i, 1))
    counted(metrics, 60)
    assert len(read(metrics)) == size
    metrics.count_drop("a reason of nobody's")
    assert read(metrics)["vismem_refused_total", "other"] == 1


def test_requests_in_flight_return_to_zero_even_after_disconnects(site) -> None:
    metrics, port, free = site
    with connected(port) as one, connected(port) as other:
        one.sendall(get("/health"))
        other.sendall(get("/health"))
        until(lambda: read(metrics)[("vismem_requests_in_flight",)] == 2)
    free.set()
    until(lambda: read(metrics)[("vismem_requests_in_flight",)] == 0)
