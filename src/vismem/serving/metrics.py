"""Prometheus metrics: requests, answers, tokens, memory, refusals.

Label values come from fixed lists, never from clients.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vismem.serving.errors import ApiError
from vismem.serving.events import Ended, Event, Invoked, Started, TextDelta

if TYPE_CHECKING:
    from vismem.serving.engine import Load

ROUTES = (
    "/v1/chat/completions",
    "/v1/models",
    "/health",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/",
)
MODEL_ROUTE = "/v1/models/{name}"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REFUSALS = {
    400: "invalid",
    401: "key",
    403: "forbidden",
    404: "not_found",
    405: "method",
    408: "slow_body",
    413: "too_large",
    415: "media_type",
    429: "full",
    431: "headers",
    503: "unavailable",
    504: "timeout",
}
DROPS = ("slow_head", "slow_reader", "connections", "bad_http")
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one application, in their own registry.

    Args:
        load: returns the number of waiting and running rows; called whenever the metrics are read.
    """

    def __init__(self, load: Callable[[], Load]) -> None:
        registry = self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.requests = counter("vismem_requests", "Requests answered.", ["route", "method", "status"])
        self.in_flight = gauge("vismem_requests_in_flight", "Requests being answered.")
        self.refused = counter("vismem_refused", "Requests and connections refused.", ["reason"])
        gauge("vismem_rows_waiting", "Rows waiting for the batch.").set_function(lambda: load().waiting)
        gauge("vismem_rows_writing", "Rows being decoded.").set_function(lambda: load().writing)
        self.answers = counter("vismem_answers", "Answers by outcome.", ["outcome"])
        self.first_text = histogram(
            "vismem_time_to_first_token_seconds", "From a request to its first text.", buckets=FIRST_TOKEN_BUCKETS
        )
        self.gap = histogram("vismem_inter_token_seconds", "Between two text deltas of a choice.", buckets=GAP_BUCKETS)
        self.duration = histogram(
            "vismem_answer_seconds", "From a request to the end of its answer.", buckets=DURATION_BUCKETS
        )
        help_text = "Prompt and completion tokens, invocation and end tokens, and memory vectors."
        self.tokens = counter("vismem_tokens", help_text, ["kind"])
        self.invocations = counter("vismem_invocations", "Memory invocations.", ["kind", "forced"])
        for outcome in ("done", "cancelled", "timeout", "refused", "error"):
            self.answers.labels(outcome)
        for kind in ("prompt", "completion", "invocation", "short", "long"):
            self.tokens.labels(kind)
        for kind in ("short", "long"):
            for forced in ("true", "false"):
                self.invocations.labels(kind, forced)
        for reason in (*REFUSALS.values(), *DROPS):
            self.refused.labels(reason)

    def render(self) -> tuple[bytes, str]:
        """The metrics in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def count_drop(self, reason: str) -> None:
        """Counts a dropped connection; for `ConnectionLimits.on_drop`."""
        self.refused.labels(reason if reason in DROPS else "other").inc()

    async def watch(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Yields the events and counts them. Closing it closes `events` and counts a cancelled answer."""
        start, outcome = time.perf_counter(), "cancelled"
        last: dict[int, float] = {}  # when each choice had its last text
        try:
            async with aclosing(events):
                async for event in events:
                    self._count(event, start, last)
                    yield event
            outcome = "done"
        except ApiError as error:
            outcome = "timeout" if error.status == 504 else "error" if error.status >= 500 else "refused"
            raise
        except Exception:
            outcome = "error"
            raise
        finally:
            self.answers.labels(outcome).inc()
            if outcome != "refused":
                self.duration.observe(time.perf_counter() - start)

    def _count(self, event: Event, start: float, last: dict[int, float]) -> None:
        now = time.perf_counter()
        if isinstance(event, Started):
            self.tokens.labels("prompt").inc(event.prompt_tokens)
        elif isinstance(event, TextDelta):
            if not last:
                self.first_text.observe(now - start)
            elif event.index in last:
                self.gap.observe(now - last[event.index])
            last[event.index] = now
        elif isinstance(event, Invoked):
            self.invocations.labels(event.invocation.kind, str(event.invocation.forced).lower()).inc()
        elif isinstance(event, Ended):
            self.tokens.labels("completion").inc(event.completion_tokens)
            self.tokens.labels("invocation").inc(event.memory.invocation_tokens)
            self.tokens.labels("short").inc(event.memory.short_vectors)
            self.tokens.labels("long").inc(event.memory.long_vectors)


class RequestCounter:
    """Counts every request and its status. Goes outside the guards, so refused requests count too.

    Args:
        app: the guarded application.
        metrics: what to count with.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics, method = self.metrics, scope["method"] if scope["method"] in METHODS else "other"
        metrics.in_flight.inc()
        try:
            await self.app(scope, receive, send_and_record)
        finally:
            metrics.in_flight.dec()
            metrics.requests.labels(route_of(scope["path"]), method, str(status) if status else "none").inc()
            if status in REFUSALS:
                metrics.refused.labels(REFUSALS[status]).inc()


def route_of(path: str) -> str:
    """The route label of a path."""
    if path in ROUTES:
        return path
    return MODEL_ROUTE if path.startswith("/v1/models/") else "other"
