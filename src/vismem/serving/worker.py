"""The thread that owns a model: requests of any threads go into its queue, and what each step wrote comes back as news.

Nobody else touches the model while a worker has it; what must, as an analysis of a finished answer, is called in its
thread, between two steps. Text, images and HTTP are for others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

from vismem.decoding.output import NonFiniteError
from vismem.decoding.queue import Answer, Request, RequestQueue
from vismem.decoding.trace import Invocation, Top
from vismem.model import VisMem

Finish = Literal["stop", "length", "cancelled", "error"]
P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


class Full(Exception):
    """As many rows wait as may; ask again later."""


class Closed(Exception):
    """The worker takes no more requests."""


@dataclass(frozen=True)
class News:
    """What one step did for one row of a request.

    Args:
        index: the row within the request.
        tokens: its new tokens, invocation and end ids among them.
        invocations: those of its invocations that began and ended in this step.
        tops: for each token what the request's `top` asks for; empty without it.
        finish: how the row ended, or None as long as it goes on.
        error: what went wrong, with `"error"`.
    """

    index: int
    tokens: list[int]
    invocations: list[Invocation]
    tops: list[Top | None]
    finish: Finish | None = None
    error: BaseException | None = None


@dataclass(eq=False)
class Ticket:
    """A request that was taken.

    Args:
        request: the request.
        rows: how many answers it has.
        listener: is told of every step that wrote something for it.
        answers: the queue's answers, once the worker has them.
    """

    request: Request
    rows: int
    listener: Callable[[News], object]
    answers: list[Answer] = field(default_factory=list)
    told: list[tuple[int, int]] = field(default_factory=list)  # tokens and invocations that the listener knows of
    over: set[int] = field(default_factory=set)  # rows whose end it knows of


@dataclass(frozen=True, eq=False)
class Order:
    """What the worker's thread is to do between two steps, and who waits for it."""

    do: Callable[[], None]
    future: Future[Any] | None = None


class Worker:
    """Decodes requests of many threads in one live batch, in a thread of its own.

    Args:
        model: the `VisMem`.
        batch_size: rows at a time.
        most_waiting: rows that may wait beside them.
        record: keep what `Answer.rollout` needs.
        **generation: generation keywords for all requests, as for `RequestQueue`.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> worker = Worker(model, batch_size=8, max_new_tokens=64)
        >>> worker.submit(Request(inputs), print)
        >>> worker.close(finish_within=10)
    """

    def __init__(
        self, model: VisMem, batch_size: int = 16, most_waiting: int = 64, *, record: bool = False, **generation: Any
    ) -> None:
        if most_waiting < 0:
            raise ValueError(f"most_waiting must be 0 or more, got {most_waiting}")
        self.model, self.most_waiting = model, most_waiting
        self.queue = RequestQueue(model, batch_size, record=record, **generation)
        self.orders: deque[Order] = deque()  # what other threads want done between two steps
        self.awake = threading.Condition()
        self.tickets: dict[Ticket, None] = {}  # in the order in which they came
        self.closing, self.deadline = False, float("inf")
        self.thread = threading.Thread(target=self._run, name="vismem-worker", daemon=True)
        self.thread.start()

    # From any thread.

    @property
    def rows(self) -> int:
        """Rows that wait or are being written."""
        with self.awake:
            return sum(ticket.rows - len(ticket.over) for ticket in self.tickets)

    @property
    def writing(self) -> int:
        """Rows that are being written."""
        return len(self.queue.answers)

    @property
    def alive(self) -> bool:
        """Whether requests are still worked on."""
        return self.thread.is_alive()

    def submit(self, request: Request, listener: Callable[[News], object], rows: int = 1) -> Ticket:
        """Queues a request.

        Args:
            request: the request.
            listener: is called with `News` in the worker's thread, which waits for it; its own errors end the request.
            rows: how many answers the request has: its prompts times `num_return_sequences`.

        Raises:
            Closed: if the worker takes no more.
            Full: if there is no room for these rows even to wait.
            ValueError: if the request has more rows than the batch.
        """
        ticket = Ticket(request, rows, listener)
        if rows > self.queue.batch_size:
            raise ValueError(f"a request of {rows} rows does not fit a batch of {self.queue.batch_size}")
        with self.awake:
            if self.closing or not self.alive:
                raise Closed("the worker takes no more requests")
            held = sum(other.rows - len(other.over) for other in self.tickets)
            if held + rows > self.queue.batch_size + self.most_waiting:
                raise Full(f"{held} rows are being written or wait; there is room for {self.most_waiting} to wait")
            self.tickets[ticket] = None
            self._order(Order(lambda: self._enter(ticket)))
        return ticket

    def cancel(self, ticket: Ticket, row: int | None = None) -> None:
        """Gives a request up, or one row of it, waiting or under way; what ended is left as it is."""
        with self.awake:
            part = slice(None) if row is None else slice(row, row + 1)
            self._order(Order(lambda: self.queue.cancel(ticket.answers[part])))

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Runs a function in the worker's thread, between two steps.

        Raises:
            Closed: if the worker takes no more.
        """
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        with self.awake:
            if self.closing or not self.alive:
                raise Closed("the worker takes no more calls")
            self._order(Order(run, future))
        return future

    def close(self, finish_within: float = 0.0) -> None:
        """Takes nothing more, lets rows finish for that many seconds, cancels the rest, and waits for the thread."""
        with self.awake:
            self.closing = True
            self.deadline = min(self.deadline, time.monotonic() + finish_within)
            self.awake.notify()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _order(self, order: Order) -> None:
        self.orders.append(order)
        self.awake.notify()

    # In the worker's thread.

    def _run(self) -> None:
        try:
            while self._orders_are_done():
                if self.tickets and time.monotonic() >= self.deadline:
                    self.queue.clear()
                elif len(self.queue):
                    self._step()
                self._tell()
        except BaseException as error:  # as when a device is lost
            log.exception("the thread that owns the model ends: %s", error)
            with self.awake:
                self.closing = True
                orders, self.orders = self.orders, deque()
            for order in orders:
                if order.future is not None and order.future.set_running_or_notify_cancel():
                    order.future.set_exception(error)
            for ticket in self.tickets:
                for index in set(range(ticket.rows)) - ticket.over:
                    with suppress(Exception):
                        ticket.listener(News(index, [], [], [], "error", error))

    def _orders_are_done(self) -> bool:
        """Does what was ordered, and waits as long as there is nothing to do. False if there never will be."""
        while True:
            with self.awake:
                while not (self.orders or self.tickets or self.closing):
                    self.awake.wait()
                if not self.orders:
                    return bool(self.tickets)
                order = self.orders.popleft()
            order.do()

    def _enter(self, ticket: Ticket) -> None:
        ticket.told = [(0, 0)] * ticket.rows
        try:
            ticket.answers = self.queue.submit(ticket.request)
            if len(ticket.answers) != ticket.rows:
                self.queue.cancel(ticket.answers)
                raise ValueError(f"the request has {len(ticket.answers)} rows, not {ticket.rows} as was said")
        except Exception as error:  # as prompts that say nothing of ids
            ticket.answers = [Answer(ticket.request, row, "error", error) for row in range(ticket.rows)]

    def _step(self) -> None:
        try:
            errors = {id(answer.error): answer.error for answer in self.queue.step()}
        except Exception as error:  # the rows that it met have ended with it
            log.exception("a step failed: %s", error)
        else:
            for found in errors.values():
                if isinstance(found, NonFiniteError):
                    log.error("an answer failed: %s", found)
                elif found is not None and not isinstance(found, ValueError):
                    log.error("a prompt could not be read: %s", found, exc_info=found)

    def _tell(self) -> None:
        """Tells the listeners what is new, and forgets requests that are over."""
        for ticket in list(self.tickets):
            for index, answer in enumerate(ticket.answers):
                if index in ticket.over:
                    continue
                (tokens, met), finish = ticket.told[index], answer.finish
                if len(answer.tokens) == tokens and finish is None:
                    continue
                ticket.told[index] = len(answer.tokens), len(answer.invocations)
                if answer.error is not None:  # else it would keep all tensors that it met, in circles
                    answer.error.__traceback__ = None
                news = News(
                    index, answer.tokens[tokens:], answer.invocations[met:], answer.tops[tokens:], finish, answer.error
                )
                if finish is not None:
                    with self.awake:
                        ticket.over.add(index)
                try:
                    ticket.listener(news)
                except Exception:
                    log.exception("a listener failed; its request is given up")
                    self.queue.cancel(ticket.answers)
            if ticket.answers and len(ticket.over) == len(ticket.answers):
                with self.awake:
                    del self.tickets[ticket]
