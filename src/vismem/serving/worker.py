"""The thread that owns a model: any thread can submit requests, and gets an update for each decoding step.

Nothing else may use the model while a worker owns it. Other work on the model, such as inspecting a finished answer,
goes through `Worker.call`, which runs it between two steps. The worker knows nothing of text, image files or HTTP.
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
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

from vismem.decoding.output import NonFiniteError
from vismem.decoding.queue import Answer, Request, RequestQueue
from vismem.decoding.trace import Invocation, Top
from vismem.deprecation import renamed, renamed_arguments
from vismem.model import VisMem

Finish = Literal["stop", "length", "cancelled", "error"]
P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Too many rows are waiting; try again later."""


class WorkerClosedError(Exception):
    """The worker accepts no more requests."""


@dataclass(frozen=True)
class RowUpdate:
    """What one decoding step did to one row of a request.

    Args:
        index: the row within the request.
        tokens: its new tokens, including invocation and end ids.
        invocations: its invocations that finished in this step.
        tops: for each token, what the request's `top` asks for; empty without it.
        finish: how the row ended, or None while it is running.
        error: what went wrong, if `finish` is "error".
    """

    index: int
    tokens: list[int]
    invocations: list[Invocation]
    tops: list[Top | None]
    finish: Finish | None = None
    error: BaseException | None = None


@dataclass(eq=False)
class Ticket:
    """A submitted request.

    Args:
        request: the request.
        rows: number of rows that it decodes.
        listener: called with each `RowUpdate`.
        answers: the queue's answers, once the worker has queued the request.
    """

    request: Request
    rows: int
    listener: Callable[[RowUpdate], object]
    answers: list[Answer] = field(default_factory=list)
    reported: list[tuple[int, int]] = field(default_factory=list)  # tokens and invocations reported for each row
    finished: set[int] = field(default_factory=set)  # rows whose end was reported


class Worker:
    """Decodes requests from any thread in one continuous batch, in its own thread.

    Args:
        model: the `VisMem`.
        batch_size: rows decoded at the same time.
        max_waiting: further rows that may wait.
        record: keep what `Answer.rollout` needs.
        **generation: generation keywords for all requests, as for `RequestQueue`.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> worker = Worker(model, batch_size=8, max_new_tokens=64)
        >>> worker.submit(Request(inputs), print)
        >>> worker.close(finish_within=10)
    """

    @renamed_arguments(most_waiting="max_waiting")
    def __init__(
        self, model: VisMem, batch_size: int = 16, max_waiting: int = 64, *, record: bool = False, **generation: Any
    ) -> None:
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be 0 or more, got {max_waiting}")
        self.model, self.max_waiting = model, max_waiting
        self.queue = RequestQueue(model, batch_size, record=record, **generation)
        # Run between two steps; each with the future of its result if anyone waits for it.
        self.tasks: deque[tuple[Callable[[], object], Future[Any] | None]] = deque()
        self.awake = threading.Condition()
        self.tickets: dict[Ticket, None] = {}  # in order of submission
        self.closing, self.deadline = False, float("inf")
        self.thread = threading.Thread(target=self._run, name="vismem-worker", daemon=True)
        self.thread.start()

    # Called from any thread.

    @property
    def rows(self) -> int:
        """Number of rows waiting or being decoded."""
        with self.awake:
            return sum(ticket.rows - len(ticket.finished) for ticket in self.tickets)

    @property
    def writing(self) -> int:
        """Number of rows being decoded."""
        return len(self.queue.answers)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self.thread.is_alive()

    def submit(self, request: Request, listener: Callable[[RowUpdate], object], rows: int = 1) -> Ticket:
        """Queues a request.

        Args:
            request: the request.
            listener: called with each `RowUpdate` in the worker's thread, which blocks until it returns. If it raises,
                the request is cancelled.
            rows: number of rows of the request: its prompts times `num_return_sequences`.

        Raises:
            WorkerClosedError: if the worker accepts no more requests.
            QueueFullError: if too many rows are waiting.
            ValueError: if the request has more rows than the batch.
        """
        ticket = Ticket(request, rows, listener)
        size = self.queue.batch_size
        if rows > size:
            raise ValueError(f"a request of {rows} rows does not fit a batch of {size}")
        with self.awake:
            self._check_open()
            if self.rows + rows > size + self.max_waiting:
                raise QueueFullError(
                    f"{self.rows} rows are running or waiting, and at most {size} can run and {self.max_waiting} wait"
                )
            self.tickets[ticket] = None
            self._add(lambda: self._enqueue(ticket))
        return ticket

    def cancel(self, ticket: Ticket, row: int | None = None) -> None:
        """Cancels a request, or one of its rows. Finished rows stay as they are."""
        part = slice(None) if row is None else slice(row, row + 1)
        with self.awake:
            self._add(lambda: self.queue.cancel(ticket.answers[part]))

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Runs a function in the worker's thread, between two steps.

        Raises:
            WorkerClosedError: if the worker accepts no more calls.
        """
        future: Future[R] = Future()
        with self.awake:
            self._check_open()
            self._add(partial(function, *args, **kwargs), future)
        return future

    def close(self, finish_within: float = 0.0) -> None:
        """Refuses new requests, gives rows `finish_within` seconds to finish, cancels the rest, joins the thread."""
        with self.awake:
            self.closing = True
            self.deadline = min(self.deadline, time.monotonic() + finish_within)
            self.awake.notify()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _check_open(self) -> None:
        if self.closing or not self.alive:
            raise WorkerClosedError("the worker accepts no more requests")

    def _add(self, task: Callable[[], object], future: Future[Any] | None = None) -> None:
        self.tasks.append((task, future))
        self.awake.notify()

    # Called in the worker's thread.

    def _run(self) -> None:
        try:
            while self._run_tasks():
                if self.tickets and time.monotonic() >= self.deadline:
                    self.queue.clear()
                elif len(self.queue):
                    self._step()
                self._report()
        except BaseException as error:  # e.g. a lost device
            log.exception("the thread that owns the model ends: %s", error)
            with self.awake:
                self.closing = True
                tasks, self.tasks = self.tasks, deque()
            for _, future in tasks:
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_exception(error)
            for ticket in self.tickets:
                for index in set(range(ticket.rows)) - ticket.finished:
                    with suppress(Exception):
                        ticket.listener(RowUpdate(index, [], [], [], "error", error))

    def _run_tasks(self) -> bool:
        """Runs the tasks, and waits while there is nothing to do. Returns False once the worker should end."""
        while True:
            with self.awake:
                while not (self.tasks or self.tickets or self.closing):
                    self.awake.wait()
                if not self.tasks:
                    return bool(self.tickets)
                task, future = self.tasks.popleft()
            if future is None:
                task()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)

    def _enqueue(self, ticket: Ticket) -> None:
        ticket.reported = [(0, 0)] * ticket.rows
        try:
            ticket.answers = self.queue.submit(ticket.request)
            if len(ticket.answers) != ticket.rows:
                self.queue.cancel(ticket.answers)
                raise ValueError(f"the request has {len(ticket.answers)} rows, not {ticket.rows} as submitted")
        except Exception as error:  # e.g. inputs without input_ids
            ticket.answers = [Answer(ticket.request, row, "error", error) for row in range(ticket.rows)]

    def _step(self) -> None:
        try:
            errors = {id(answer.error): answer.error for answer in self.queue.step()}
        except Exception as error:  # the queue has ended the rows it affects
            log.exception("a step failed: %s", error)
        else:
            for found in errors.values():
                if isinstance(found, NonFiniteError):
                    log.error("an answer failed: %s", found)
                elif found is not None and not isinstance(found, ValueError):
                    log.error("a prompt could not be read: %s", found, exc_info=found)

    def _report(self) -> None:
        """Calls the listeners with what is new, and forgets finished requests."""
        for ticket in list(self.tickets):
            for index, answer in enumerate(ticket.answers):
                if index in ticket.finished:
                    continue
                (tokens, invocations), finish = ticket.reported[index], answer.finish
                if len(answer.tokens) == tokens and finish is None:
                    continue
                ticket.reported[index] = len(answer.tokens), len(answer.invocations)
                if answer.error is not None:  # its traceback would keep tensors alive, in reference cycles
                    answer.error.__traceback__ = None
                new = answer.tokens[tokens:], answer.invocations[invocations:], answer.tops[tokens:]
                update = RowUpdate(index, *new, finish, answer.error)
                if finish is not None:
                    with self.awake:
                        ticket.finished.add(index)
                try:
                    ticket.listener(update)
                except Exception:
                    log.exception("a listener failed; its request is cancelled")
                    self.queue.cancel(ticket.answers)
            if ticket.answers and len(ticket.finished) == len(ticket.answers):
                with self.awake:
                    del self.tickets[ticket]


__getattr__ = renamed(__name__, {"Closed": "WorkerClosedError", "Full": "QueueFullError", "News": "RowUpdate"})
