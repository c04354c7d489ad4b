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

from vismem.serving.errors import ApiError
from vismem.serving.protocol import ChatChunk

if TYPE_CHECKING:
    from vismem.serving.engine import Load

ROUTES = ("/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json", "/docs", "/")
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
    """The metrics of one application, in their own registry. `load` is called whenever they are read."""

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

    async def watch(self, chunks: AsyncGenerator[ChatChunk, None]) -> AsyncGenerator[ChatChunk, None]:
        """Yields the chunks and counts them. Closing it closes `chunks` and counts a cancelled answer."""
        start, outcome, usage = time.perf_counter(), "cancelled", None
        last: dict[int, float] = {}  # when each choice had its last text
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    usage, now = chunk.usage, time.perf_counter()
                    for choice in chunk.choices:
                        if choice.delta.content or choice.logprobs:
                            if not last:
                                self.first_text.observe(now - start)
                            elif choice.index in last:
                                self.gap.observe(now - last[choice.index])
                            last[choice.index] = now
                        for each in choice.vismem.invocations if choice.vismem else ():
                            self.invocations.labels(each.kind, str(each.forced).lower()).inc()
                    yield chunk
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
            if usage is not None:
                self.tokens.labels("prompt").inc(usage.prompt_tokens)
                self.tokens.labels("completion").inc(usage.completion_tokens)
                self.tokens.labels("invocation").inc(usage.memory.invocation_tokens)
                self.tokens.labels("short").inc(usage.memory.short_vectors)
                self.tokens.labels("long").inc(usage.memory.long_vectors)

    def count_request(self, method: str, path: str, status: int | None) -> None:
        """Counts a request that has ended; `status` is None if it got no response."""
        route = path if path in ROUTES else MODEL_ROUTE if path.startswith("/v1/models/") else "other"
        method = method if method in METHODS else "other"
        self.requests.labels(route, method, str(status or "none")).inc()
        if status in REFUSALS:
            self.refused.labels(REFUSALS[status]).inc()
