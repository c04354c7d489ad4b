"""Continuous batching: finished rows leave the batch, and waiting requests take their place.

`VisMem.stream_batch` is the short way. Use a `RequestQueue` to add, watch and cancel requests while others run.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vismem.decoding.cache import Slots
from vismem.decoding.decoder import Decoder
from vismem.decoding.output import NonFiniteError
from vismem.decoding.policies import Policy, policy_of
from vismem.decoding.prepare import (
    Layout,
    Prepared,
    asked_cache,
    cache_implementation,
    read_into_dynamic_cache,
    setting,
)
from vismem.decoding.processors import plain
from vismem.decoding.row import Row
from vismem.decoding.trace import Invocation, Rollout, Top

if TYPE_CHECKING:
    from vismem.model import VisMem

MOST_KINDS = 1024  # remembered at a time, as clients can make any number of them
MOST_PADDED = 1.5  # most positions per token, padding included, in prompts read together


@dataclass(eq=False)
class Request:
    """Prompts, with overrides of the queue's settings.

    Args:
        inputs: the processor's output for one prompt or a padded batch.
        invocation: the policy, or None for the queue's. Rows count from 0 within the request.
        seed: of sampling; row n of the request uses `seed + n`, or entry n of a list. By default it comes from torch's
            global generator. A row's samples depend on its seed alone, not on what runs beside it.
        generation: generation keywords for this request only.
        tag: anything; answers carry it.
        top: keep each sampled token's log-probability and those of the `top` likeliest tokens; None keeps nothing.
    """

    inputs: dict[str, Tensor]
    invocation: str | Policy | None = None
    seed: int | list[int] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    tag: Any = None
    top: int | None = None


@dataclass(eq=False)
class Answer:
    """One row of a request; its properties grow with every step of the queue.

    Args:
        request: the request it answers.
        index: its row within the request.
        finish: `"stop"` (an end token or a stopping criterion), `"length"`, `"cancelled"`, `"error"`, or None while it
            is not done.
        error: why the request was refused or failed; a `NonFiniteError` if its own numbers were not finite.
        row: the row of the decoder; None while the request waits.
    """

    request: Request
    index: int
    finish: Literal["stop", "length", "cancelled", "error"] | None = None
    error: BaseException | None = None
    row: Row | None = field(default=None, repr=False)

    @property
    def tag(self) -> Any:
        """The request's tag."""
        return self.request.tag

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far, invocation and end tokens among them."""
        return [] if self.row is None else self.row.tokens

    @property
    def taken(self) -> bool:
        """Whether decoding started: the prompt was read and the row entered the batch."""
        return self.row is not None

    @property
    def sampled(self) -> int:
        """Number of sampled tokens so far."""
        return 0 if self.row is None else self.row.sampled

    @property
    def invocations(self) -> list[Invocation]:
        """The invocations so far."""
        return [] if self.row is None else self.row.invocations

    @property
    def tops(self) -> list[Top | None]:
        """What the request's `top` asks for, per token; None for inserted tokens."""
        return [] if self.row is None else self.row.record.tops

    @property
    def rollout(self) -> Rollout:
        """What training needs of a finished answer; with `record=True` only."""
        if self.row is None:
            raise ValueError("no rollout: the answer has no token yet")
        return self.row.rollout()


class RequestQueue:
    """Decodes requests, first come first served, in one live batch of at most `batch_size` rows.

    Args:
        model: the `VisMem`.
        batch_size: maximum number of rows in the batch.
        invocation: policy of requests that name none.
        record: keep what training needs of every answer.
        **generation: generation keywords for all requests: `max_new_tokens`, `do_sample`, `compile_config`, ...

    Raises:
        ValueError: if `batch_size` is below 1, or a queue does not support the cache asked for.

    Example:
        >>> queue = RequestQueue(model, batch_size=8, max_new_tokens=64)
        >>> (answer,) = queue.submit(Request(inputs))
        >>> while not answer.finish:
        ...     queue.step()
    """

    def __init__(
        self,
        model: VisMem,
        batch_size: int = 16,
        *,
        invocation: str | Policy = "learned",
        record: bool = False,
        **generation: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        check_cache(model.base, generation)
        generation["cache_implementation"] = "static"
        layout = Layout.wanted(model.base, generation)
        assert layout is not None  # as it is static
        self.layout = layout
        self.model, self.batch_size, self.invocation, self.record = model, batch_size, invocation, record
        self.generation = generation
        self.waiting: deque[list[Answer]] = deque()
        self.decoder: Decoder | None = None
        self.answers: dict[int, Answer] = {}  # of the rows in progress
        self.paddable: dict[Any, bool] = {}  # by `kind_of`: whether such prompts may be padded
        self.alone: set[int] = set()  # requests whose prompts must be read by themselves
        self.entering = False  # `admit` has started to change the batch

    def __len__(self) -> int:
        """Number of rows that wait or are in progress."""
        return sum(map(len, self.waiting)) + len(self.answers)

    @property
    def hungry(self) -> bool:
        """Whether there is room that no waiting request fills."""
        return len(self) < self.batch_size

    def submit(self, request: Request) -> list[Answer]:
        """Queues a request.

        Returns:
            Its answers, one for each prompt and copy (`num_return_sequences`); they grow with the steps.

        Raises:
            ValueError: if it has more rows than the batch, or asks for a cache that a queue does not support.
        """
        if asked_cache(request.generation):
            check_cache(self.model.base, request.generation)
        copies = setting(self.model.base, {**self.generation, **request.generation}, "num_return_sequences") or 1
        count = len(request.inputs["input_ids"]) * copies
        if count > self.batch_size:
            raise ValueError(f"a request of {count} rows does not fit a batch of {self.batch_size}; raise batch_size")
        found = [Answer(request, index) for index in range(count)]
        self.waiting.append(found)
        return found

    def cancel(self, answers: Iterable[Answer]) -> None:
        """Cancels answers: waiting ones never start, those in progress stop."""
        cancelled = {id(answer): answer for answer in answers if answer.finish is None}
        rows = [answer.row for answer in cancelled.values() if answer.row is not None]
        for answer in cancelled.values():
            answer.finish = "cancelled"
        self.waiting = deque(group for group in self.waiting if any(answer.finish is None for answer in group))
        for row in rows:
            del self.answers[id(row)]
        if rows and self.decoder is not None:
            self.decoder.leave(rows)

    def clear(self) -> None:
        """Cancels all answers that wait or are in progress."""
        self.cancel([*self.answers.values(), *(answer for group in self.waiting for answer in group)])

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Admits waiting requests while there is room, and writes one token of every row.

        Returns:
            The answers that ended, with `finish` set: `"error"` for a request that was refused or whose numbers are
            not finite, which affects no other.

        Raises:
            Exception: an error in the step itself, for example in your logits processor. All answers in progress then
                end with `finish="error"`; waiting requests are kept, and the queue can be used further.
        """
        ended, groups = [], []
        try:
            while groups := self.together():
                try:
                    self.admit(groups)
                except Exception as error:
                    if self.entering and not isinstance(error, ValueError):
                        raise
                    if len(groups) == 1:
                        ended += failed(groups[0], error)
                    else:  # one of them is at fault: read each by itself, before all others
                        self.alone.update(id(group[0].request) for group in groups)
                        self.waiting.extendleft(reversed(groups))
            rows = self.decoder.step() if self.decoder is not None and self.decoder.rows else []
        except BaseException as error:  # in the middle of a step: no row is whole any more
            failed([*self.answers.values(), *(answer for group in groups for answer in group)], error)
            self.answers = {}
            if self.decoder is not None and isinstance(self.decoder.cache, Slots):
                self.decoder.cache.user, self.decoder = None, None
            raise
        for row in rows:
            answer = self.answers.pop(id(row))
            if row.error is not None:
                ended += failed([answer], row.error)
                continue
            answer.finish = "stop" if row.sampled < row.settings.budget or row.ended_by_eos else "length"
            ended.append(answer)
        return ended

    def together(self) -> list[list[Answer]]:
        """The next waiting requests that fit the batch and can be read as one padded batch, or none."""
        found: list[list[Answer]] = []
        room, longest, total = self.batch_size - len(self.answers), 0, 0
        while self.waiting and len(self.waiting[0]) <= room:
            request = self.waiting[0][0].request
            kind, length = self.kind_of(request), request.inputs["input_ids"].shape[1]
            longest, total = max(longest, length), total + length
            if found:
                alike = kind is not None and kind == self.kind_of(found[0][0].request) and self.paddable.get(kind)
                if not alike or longest * (len(found) + 1) > MOST_PADDED * total:
                    break
            found.append(self.waiting.popleft())
            room -= len(found[-1])
        return found

    def kind_of(self, request: Request) -> Any:
        """What requests must share to be read together; None for one that must be read by itself.

        Their tensors must fit together, all settings except `max_new_tokens` must be equal, and the policy must not
        depend on the rows of a call.
        """
        policy, keywords = self.policy_of(request), {**self.generation, **request.generation}
        counts = policy.injects or (setting(self.model.base, keywords, "num_return_sequences") or 1) > 1
        if counts or id(request) in self.alone or setting(self.model.base, keywords, "max_new_tokens") is None:
            return None
        ids = request.inputs["input_ids"]
        padded = "attention_mask" in request.inputs
        shapes = {
            name: None if padded and tensor.shape == ids.shape else tuple(tensor.shape[1:])
            for name, tensor in request.inputs.items()
        }
        said = {name: plain(value) for name, value in keywords.items() if name != "max_new_tokens"}
        return repr(policy), tuple(sorted(shapes.items())), tuple(sorted(said.items()))

    def policy_of(self, request: Request) -> Policy:
        """The policy of a request."""
        return policy_of(self.invocation if request.invocation is None else request.invocation)

    def admit(self, groups: list[list[Answer]]) -> None:
        """Reads the prompts of requests that go together, and adds their rows to the batch."""
        model, requests = self.model, [group[0].request for group in groups]
        kind, self.entering = self.kind_of(requests[0]), False
        self.alone.difference_update(map(id, requests))
        keywords = [{**self.generation, **request.generation} for request in requests]
        budgets = [setting(model.base, each, "max_new_tokens") for each in keywords]
        inputs = requests[0].inputs
        if len(groups) > 1:
            inputs = pad_together([request.inputs for request in requests], model.processor.tokenizer.pad_token_id)
            keywords[0]["max_new_tokens"] = max(budgets)
        arguments = {**keywords[0], **inputs}
        read_into_dynamic_cache(arguments)
        call = model.prepare(self.policy_of(requests[0]), record=self.record, **arguments)
        settings = call.settings
        if len(self.paddable) >= MOST_KINDS:
            self.paddable.clear()
        self.paddable[kind] = settings.ignores_ids and not settings.criteria and settings.streamer is None
        decoder = self._decoder_for(call)
        prompts = decoder.read_prompts(call)
        if len(groups) > 1 and not prompts.hidden.isfinite().all():
            raise NonFiniteError("a prompt read together with others is not finite")  # each is then read by itself
        seeds = [seed for group in groups for seed in seeds_of(group)] if settings.config.do_sample else None
        self.entering = True
        rows = decoder.enter(prompts, settings, call.copies, seeds)
        answers = [(answer, budget) for group, budget in zip(groups, budgets, strict=True) for answer in group]
        for (answer, budget), row in zip(answers, rows, strict=True):
            if len(groups) > 1:
                row.settings = copy.copy(row.settings)
                row.settings.budget = budget
            answer.row, row.tag, row.record.top = row, answer.tag, answer.request.top
            self.answers[id(row)] = answer
            if answer.finish is not None:  # cancelled while it waited, unlike others of its request
                self.answers.pop(id(row))
                decoder.leave([row])

    def _decoder_for(self, call: Prepared) -> Decoder:
        """The queue's decoder, made for the first call and with room for this one."""
        columns = self.layout.columns(call, self.model.memory_config)
        if self.decoder is None:
            slots = self.layout.slots(self.model.base, self.batch_size, columns)
            self.decoder = self.model.decoder(slots)
        elif self.layout.compiled is not None and isinstance(self.decoder.cache, Slots):
            self.decoder.cache.reserve(columns)  # now: growing at every step would compile each time
        return self.decoder


def check_cache(base: Any, generation: dict[str, Any]) -> None:
    """Raises ValueError for a cache that a queue cannot use: its keys and values lie in slots on the device."""
    if (wanted := cache_implementation(base, generation)) == "offloaded":
        raise ValueError(f"a queue of requests has no cache_implementation={wanted!r}; pass 'static', or use generate")


def seeds_of(group: list[Answer]) -> list[int]:
    """A seed for each answer of a group."""
    seed = group[0].request.seed
    if isinstance(seed, (list, tuple)):
        return list(seed)
    first = int(torch.randint(2**62, ())) if seed is None else seed
    return [first + index for index in range(len(group))]


def pad_together(inputs: list[dict[str, Tensor]], pad: int | None) -> dict[str, Tensor]:
    """Merges prompts into one batch: per-token tensors are padded on the left, images concatenated."""
    longest = max(each["input_ids"].shape[1] for each in inputs)

    def padded(each: dict[str, Tensor], name: str) -> Tensor:
        tensor, ids = each[name], each["input_ids"]
        if tensor.shape != ids.shape:
            return tensor
        return torch.nn.functional.pad(
            tensor, (longest - ids.shape[1], 0), value=(pad or 0) if name == "input_ids" else 0
        )

    return {name: torch.cat([padded(each, name) for each in inputs]) for name in inputs[0]}


def failed(answers: list[Answer], error: BaseException) -> list[Answer]:
    """Ends those answers that have not ended with an error, and returns them."""
    found = [answer for answer in answers if answer.finish is None]
    for answer in found:
        answer.finish, answer.error = "error", error
    return found


def stream(queue: RequestQueue, requests: Iterable[Request | dict[str, Tensor]]) -> Iterator[Answer]:
    """Yields answers as soon as they are done; takes requests from the iterable as there is room.

    Answers whose numbers are not finite are yielded too, with `finish="error"` and a `NonFiniteError`.

    Raises:
        ValueError: if a request is refused; names it by its tag if that is a string, else by its number. Answers
            yielded before are complete.
    """
    taken, names = 0, {}
    source: Iterator[Request | dict[str, Tensor]] | None = iter(requests)
    try:
        while True:
            while source is not None and queue.hungry:
                request = next(source, None)
                if request is None:
                    source = None
                    break
                request = request if isinstance(request, Request) else Request(dict(request))
                names[id(request)] = request.tag if isinstance(request.tag, str) else f"request {taken}"
                try:
                    queue.submit(request)
                except ValueError as error:
                    raise ValueError(f"{names[id(request)]}: {error}") from error
                taken += 1
            if source is None and not len(queue):
                return
            ended = queue.step()
            alone = [answer for answer in ended if answer.error is None or isinstance(answer.error, NonFiniteError)]
            yield from alone
            for answer in ended:
                if answer in alone:
                    continue
                if isinstance(answer.error, ValueError):
                    raise ValueError(f"{names[id(answer.request)]}: {answer.error}") from answer.error
                if answer.error is not None:
                    raise answer.error
    finally:
        queue.clear()  # frees the rows of a stream that is abandoned
