"""A queue of requests: finished rows leave the batch and waiting ones take their place (continuous batching).

Evaluation goes through a data set with it, and a server puts the rows of its users into one batch. `stream_batch` of
the model is the short way; `RequestQueue` is for those who add, watch and cancel requests while others run.
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

MOST_KINDS = 1024  # that are remembered at a time; clients make new ones as they like
MOST_PADDED = 1.5  # positions that a batch of prompts may have, padding counted, for each token in them


@dataclass(eq=False)
class Request:
    """What is asked: prompts, and what of the queue's settings is to be different for them.

    Args:
        inputs: the processor's output, of one prompt or of a padded batch, whose prompts are then read together.
        invocation: policy of its own, or None for the queue's. Rows count from 0 within the request.
        seed: of the sampling; row n of the request draws from `seed + n`, or from entry n of a list. Without one,
            torch's global generator gives it. A row's words depend on its seed alone, not on what runs beside it.
        generation: generation keywords of its own.
        tag: anything; answers bring it back.
        top: keep each sampled token's log-probability, and those of that many likeliest ones; None keeps nothing.
    """

    inputs: dict[str, Tensor]
    invocation: str | Policy | None = None
    seed: int | list[int] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    tag: Any = None
    top: int | None = None


@dataclass(eq=False)
class Answer:
    """One row of a request, from waiting to written; its fields grow with every step.

    Args:
        request: what it answers.
        index: its row within the request.
        finish: `"stop"` (an end token or a stopping criterion), `"length"`, `"cancelled"`, `"error"`, or None as long
            as it is not done.
        error: why the request could not be taken, or what went wrong while it was written; a `NonFiniteError` where
            its own numbers were not finite.
    """

    request: Request
    index: int
    finish: Literal["stop", "length", "cancelled", "error"] | None = None
    error: BaseException | None = None
    _row: Row | None = field(default=None, repr=False)

    @property
    def tag(self) -> Any:
        """The request's."""
        return self.request.tag

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far, invocation and end tokens among them."""
        return [] if self._row is None else self._row.tokens

    @property
    def taken(self) -> bool:
        """Whether the request was taken: its prompt was read, and this row has a place or had one."""
        return self._row is not None

    @property
    def sampled(self) -> int:
        """How many of them were sampled."""
        return 0 if self._row is None else self._row.sampled

    @property
    def invocations(self) -> list[Invocation]:
        """The invocations so far."""
        return [] if self._row is None else self._row.invocations

    @property
    def tops(self) -> list[Top | None]:
        """What the request's `top` asks for, for each token so far; None where it was put in."""
        return [] if self._row is None else self._row.record.tops

    @property
    def rollout(self) -> Rollout:
        """What training needs of the answer; of a queue with `record=True`, once it is done."""
        if self._row is None:
            raise ValueError("no rollout: the answer has no token yet")
        return self._row.rollout()


class RequestQueue:
    """Decodes requests in one live batch of at most `batch_size` rows, in the order in which they came.

    Args:
        model: the `VisMem`.
        batch_size: rows at a time.
        invocation: policy, for requests without one of their own.
        record: keep what training needs of every answer.
        **generation: generation keywords for all requests: `max_new_tokens`, `do_sample`, `compile_config`, ...

    Raises:
        ValueError: if `batch_size` is below 1, or the cache asked for is one that a queue does not have.

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
        self.answers: dict[int, Answer] = {}  # of the rows that are being written
        self.paddable: dict[Any, bool] = {}  # by `kind_of`: whether such rows may be read with padding before them
        self.alone: set[int] = set()  # requests that are to be read by themselves
        self.entering = False  # rows are just given their places

    def __len__(self) -> int:
        """Rows that wait or are being written."""
        return sum(map(len, self.waiting)) + len(self.answers)

    @property
    def hungry(self) -> bool:
        """Whether there is room that no waiting request fills."""
        return len(self) < self.batch_size

    def submit(self, request: Request) -> list[Answer]:
        """Queues a request.

        Returns:
            Its answers, one for each prompt and copy (`num_return_sequences`), which fill up with the steps.

        Raises:
            ValueError: if it has more rows than the batch, or asks for a cache that a queue does not have.
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
        """Gives answers up: those that wait never start, those being written stop where they are."""
        given_up = {id(answer): answer for answer in answers if answer.finish is None}
        rows = [answer._row for answer in given_up.values() if answer._row is not None]
        for answer in given_up.values():
            answer.finish = "cancelled"
        self.waiting = deque(group for group in self.waiting if any(answer.finish is None for answer in group))
        for row in rows:
            del self.answers[id(row)]
        if rows and self.decoder is not None:
            self.decoder.leave(rows)

    def clear(self) -> None:
        """Gives up all that wait or are being written."""
        self.cancel([*self.answers.values(), *(answer for group in self.waiting for answer in group)])

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Lets waiting requests in where there is room, and writes one token of every row.

        Returns:
            The answers that ended, with `finish` set; `"error"` where a request could not be taken or its numbers
            are not finite, which harms no other.

        Raises:
            Exception: whatever goes wrong later, as in a logits processor of yours. All answers that were being
                written then end with it, `"error"`; those that wait are not touched, and the queue can go on.
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
                    else:  # one of them is at fault: each by itself, before all others
                        self.alone.update(id(group[0].request) for group in groups)
                        self.waiting.extendleft(reversed(groups))
            rows = self.decoder.step() if self.decoder is not None and self.decoder.rows else []
        except BaseException as error:  # in the middle of a step, so that no row is whole any more
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
        """The next waiting requests that there is room for and that can be read as one padded batch, or none."""
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
        """What requests must have in common to be read together; None for one that is read by itself.

        Their tensors must fit together, all but `max_new_tokens` must be said alike, and the policy must not count
        the rows of a call.
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
        """Who decides on a request's invocations."""
        return policy_of(self.invocation if request.invocation is None else request.invocation)

    def admit(self, groups: list[list[Answer]]) -> None:
        """Reads the prompts of requests that go together and gives their answers rows."""
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
            answer._row, row.tag, row.record.top = row, answer.tag, answer.request.top
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
    """Raises ValueError for a cache that a queue cannot have: its keys and values lie in slots on the device."""
    if (wanted := cache_implementation(base, generation)) == "offloaded":
        raise ValueError(f"a queue of requests has no cache_implementation={wanted!r}; pass 'static', or use generate")


def seeds_of(group: list[Answer]) -> list[int]:
    """A seed for each answer to a request."""
    seed = group[0].request.seed
    if isinstance(seed, (list, tuple)):
        return list(seed)
    first = int(torch.randint(2**62, ())) if seed is None else seed
    return [first + index for index in range(len(group))]


def pad_together(inputs: list[dict[str, Tensor]], pad: int | None) -> dict[str, Tensor]:
    """One batch of prompts out of several: what is said of each token padded on the left, images after each other."""
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
    """Ends answers with an error, but for those that ended before. Returns those that it ended."""
    found = [answer for answer in answers if answer.finish is None]
    for answer in found:
        answer.finish, answer.error = "error", error
    return found


def stream(queue: RequestQueue, requests: Iterable[Request | dict[str, Tensor]]) -> Iterator[Answer]:
    """Yields answers to `requests`, each as soon as it is done; requests are taken from the iterable as room comes up.

    An answer whose numbers are not finite is yielded too, with `finish="error"` and a `NonFiniteError`.

    Raises:
        ValueError: if a request cannot be taken; names it by its tag where that is a text, else by its number. Answers
            given before are complete.
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
        queue.clear()  # what nobody waits for any more is not held on to
