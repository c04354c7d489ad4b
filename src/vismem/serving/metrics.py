"""What the server counts for Prometheus, in a registry of its own: requests, answers, tokens, memory, refusals.

Every label has few values: what clients write never becomes one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vismem.serving.errors import ApiError
from vismem.serving.writing import Delta, Ended, Event, Invoked, Started

if TYPE_CHECKING:
    from vismem.serving.engine import Load

ROUTES = (
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{name}",
    "/health",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/",
)
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
WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LENGTHS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of one application.

    Args:
        load: how many rows wait and are written; asked whenever the counts are read.
    """

    def __init__(self, load: Callable[[], Load]) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("vismem_requests", "Requests answered.", ["route", "method", "status"], registry=own)
        self.in_flight = Gauge("vismem_requests_in_flight", "Requests being answered.", registry=own)
        self.refused = Counter("vismem_refused", "Requests and connections refused.", ["reason"], registry=own)
        waiting = Gauge("vismem_rows_waiting", "Rows that wait for a place.", registry=own)
        waiting.set_function(lambda: load().waiting)
        writing = Gauge("vismem_rows_writing", "Rows being written.", registry=own)
        writing.set_function(lambda: load().writing)
        self.answers = Counter("vismem_answers", "Answers by how they ended.", ["outcome"], registry=own)
        self.first = Histogram(
            "vismem_time_to_first_token_seconds", "From the request to its first text.", buckets=WAITS, registry=own
        )
        self.gap = Histogram(
            "vismem_inter_token_seconds", "Between two pieces of text of a choice.", buckets=GAPS, registry=own
        )
        self.total = Histogram(
            "vismem_answer_seconds", "From the request to the end of its answer.", buckets=LENGTHS, registry=own
        )
        self.tokens = Counter(
            "vismem_tokens",
            "Tokens of prompts and of completions, tokens that invoke and end memory, and memory vectors.",
            ["kind"],
            registry=own,
        )
        self.invocations = Counter("vismem_invocations", "Invocations of memory.", ["kind", "forced"], registry=own)
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
        """The counts as Prometheus reads them, and their content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def dropped(self, reason: str) -> None:
        """Counts a connection that was ended; for `Patience.dropped`."""
        self.refused.labels(reason if reason in DROPS else "other").inc()

    async def watched(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The same events, counted. Closing this closes them, and counts a cancelled answer."""
        begin, outcome = time.perf_counter(), "cancelled"
        last: dict[int, float] = {}
        try:
            async with aclosing(events) as each:
                async for event in each:
                    self._count(event, begin, last)
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
                self.total.observe(time.perf_counter() - begin)

    def _count(self, event: Event, begin: float, last: dict[int, float]) -> None:
        now = time.perf_counter()
        if isinstance(event, Started):
            self.tokens.labels("prompt").inc(event.prompt_tokens)
        elif isinstance(event, Delta):
            if not last:
                self.first.observe(now - begin)
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


class Counted:
    """Counts every request that goes through, and what became of it. Stands outside all guards.

    Args:
        app: the guarded application.
        metrics: where to count.
        routes: paths that are counted by name; one in braces stands for any last part.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[str] = ROUTES) -> None:
        self.app, self.metrics = app, metrics
        self.exact = frozenset(route for route in routes if "{" not in route)
        self.open = [route for route in routes if "{" in route]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics, method = self.metrics, scope["method"] if scope["method"] in METHODS else "other"
        metrics.in_flight.inc()
        try:
            await self.app(scope, receive, noted)
        finally:
            metrics.in_flight.dec()
            metrics.requests.labels(self.route(scope["path"]), method, str(status) if status else "none").inc()
            if status in REFUSALS:
                metrics.refused.labels(REFUSALS[status]).inc()

    def route(self, path: str) -> str:
        """The name under which a path is counted."""
        if path in self.exact:
            return path
        return next((route for route in self.open if path.startswith(route.partition("{")[0])), "other")
