"""One model that answers chat requests: messages and images become a prompt, a worker's news become events.

Knows nothing of HTTP. Several engines in processes of their own, behind the same three methods, are in `replicas.py`.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor

from vismem.decoding.output import NonFiniteError
from vismem.decoding.policies import Forced, Policy, Random, read_policy
from vismem.decoding.prepare import context_of
from vismem.decoding.queue import Request
from vismem.model import VisMem
from vismem.serving.errors import ApiError, stopping
from vismem.serving.pictures import PictureLimits, Pictures
from vismem.serving.prompts import inputs_of, placeholders_of
from vismem.serving.worker import Closed, Full, News, Worker
from vismem.serving.writing import Delta, Ended, Event, Invoked, Started, Writer

LONGEST_TOKEN = 16  # characters of a token, on the average of any text that is not made to be long

__all__ = ["Answering", "Ask", "Delta", "Ended", "Engine", "Event", "Invoked", "Load", "Started"]


@dataclass(frozen=True)
class Ask:
    """A chat request that was checked, as plain values.

    Args:
        messages: turns: "role", and "content", a list of {"type": "text", "text"} and {"type": "image", "url"}.
        n: choices; choice i draws from `seed + i`.
        stops: strings that end a choice and are not part of it.
        top: how many likeliest tokens to tell beside each word's log-probability; None tells nothing.
        invocation: who invokes memory, as `read_policy` reads it.
        max_tokens: of each choice; None for as many as there may be.
        sampling: `temperature`, `top_p`, ...; empty for the base's own way of writing.
        continues: write on in the last turn, the assistant's.
        opens_turn: begin an assistant's turn after the messages.
    """

    messages: list[dict[str, Any]]
    n: int = 1
    seed: int = 0
    stops: tuple[str, ...] = ()
    top: int | None = None
    invocation: str = "learned"
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    continues: bool = False
    opens_turn: bool = True


@dataclass(frozen=True)
class Load:
    """Rows, of all requests that were taken: how many wait, and how many are being written."""

    waiting: int
    writing: int


class Answering(Protocol):
    """What a server needs of one engine, or of many."""

    def answer(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """The events of an answer: `Started`, then every choice's, mixed, up to its `Ended`.

        Closing the iterator gives the request up.

        Raises:
            ApiError: if the request cannot be taken, or goes wrong on the way.
        """
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    def ready(self) -> bool:
        """Whether requests are answered."""
        ...

    async def close(self, finish_within: float = 0.0) -> None:
        """Takes no more, lets answers finish for that many seconds, gives the rest up."""
        ...


COLDEST = 1e-3  # below this temperature all is greedy, and logits over it are more than a float holds
TRUNCATIONS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # and the values that cut nothing off
DRAWING = ("temperature", *TRUNCATIONS)  # settings that mean nothing where nothing is drawn
CONTEXT = 8  # last tokens of a prompt that its continuation is decoded after


class Engine:
    """One model, in this process.

    Args:
        model: the `VisMem`.
        batch_size: rows that are written at a time.
        most_waiting: rows that may wait beside them.
        context: most tokens of a prompt and its answer; by default what the base was made for.
        max_tokens: most tokens of an answer.
        pictures: what images may be, and where they may come from.
        **generation: generation keywords for all requests.
    """

    def __init__(
        self,
        model: VisMem,
        batch_size: int = 16,
        most_waiting: int = 64,
        context: int | None = None,
        max_tokens: int = 4096,
        pictures: PictureLimits | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.max_tokens, self.pictures = model, max_tokens, Pictures(pictures or PictureLimits())
        self.context = context or context_of(model.base)
        self.worker = Worker(model, batch_size, most_waiting, **generation)
        self.tokenizer = copy.deepcopy(model.processor.tokenizer)  # for text; the processor's is used in another thread
        self.preparing = ThreadPoolExecutor(1, thread_name_prefix="vismem-prompts")
        self.decoding = ThreadPoolExecutor(1, thread_name_prefix="vismem-pictures")
        self.room, self.taken = batch_size + most_waiting, 0  # taken: rows whose prompts are being made
        self.marks = placeholders_of(model)

    async def answer(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """See `Answering`."""
        if ask.n > self.worker.queue.batch_size:
            raise ApiError(
                400, f"n is {ask.n}, but this server writes at most {self.worker.queue.batch_size} rows", param="n"
            )
        policy = policy_for(ask)
        if self.taken + self.worker.rows + ask.n > self.room:
            raise full()
        self.taken += ask.n
        try:
            inputs = await self._prompt(ask)
        finally:
            self.taken -= ask.n
        request = Request(
            inputs, invocation=policy, seed=ask.seed, generation=self._generation(ask, inputs), top=ask.top
        )
        async with aclosing(self._events(ask, request)) as events:
            async for event in events:
                yield event

    def load(self) -> Load:
        """See `Answering`."""
        writing = self.worker.writing
        return Load(max(self.taken + self.worker.rows - writing, 0), writing)

    def ready(self) -> bool:
        """See `Answering`."""
        return self.worker.alive and not self.worker.closing

    async def close(self, finish_within: float = 0.0) -> None:
        """See `Answering`."""
        await asyncio.to_thread(self.worker.close, finish_within)
        for threads in (self.decoding, self.preparing):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _prompt(self, ask: Ask) -> dict[str, Tensor]:
        """The processor's tensors for the messages, on the model's device."""
        # Templates put the texts of a turn together, some with its images elsewhere, so a mark may come in parts.
        texts = ["".join(part["text"] for part in turn["content"] if part["type"] == "text") for turn in ask.messages]
        if (size := sum(map(len, texts))) > LONGEST_TOKEN * self.context:  # before work is done that grows with it
            raise ApiError(
                400,
                f"the messages have {size} characters; the context of {self.context} tokens has no room for them",
                param="messages",
                code="context_length_exceeded",
            )
        for mark in self.marks:
            if any(mark in text for text in texts):
                raise ApiError(400, f"a text has the model's own mark {mark} in it", param="messages")
        files = await self.pictures.fetch(urls_of(ask))
        loop = asyncio.get_running_loop()
        try:
            if files:
                return await loop.run_in_executor(self.decoding, self._shown, ask, files)
            return await loop.run_in_executor(self.preparing, self._processed, ask, [])
        except RuntimeError as error:
            if not self.ready():
                raise stopping() from error
            raise

    def _shown(self, ask: Ask, files: list[bytes]) -> dict[str, Tensor]:
        """Words of others do not wait while files are decoded; pictures of one request at a time are in memory."""
        return self.preparing.submit(self._processed, ask, self.pictures.decode(files)).result()

    def _processed(self, ask: Ask, pictures: list[Image]) -> dict[str, Tensor]:
        seen = iter(pictures)
        shown = [
            {
                "role": "system" if turn["role"] == "developer" else turn["role"],
                "content": [
                    {"type": "image", "image": next(seen)} if part["type"] == "image" else part
                    for part in turn["content"]
                ],
            }
            for turn in ask.messages
        ]
        try:
            return inputs_of(self.model, shown, opens_turn=ask.opens_turn, continues=ask.continues)
        except Exception as error:  # templates and processors raise what they like
            raise ApiError(400, f"the model's processor refuses these messages: {error}", param="messages") from error

    def _generation(self, ask: Ask, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Generation keywords of a request.

        Raises:
            ApiError: if prompt and answer are longer than the model's context.
        """
        prompt = inputs["input_ids"].shape[1]
        room = self.context - prompt
        if ask.max_tokens is not None and ask.max_tokens > self.max_tokens:
            raise ApiError(
                400, f"max_tokens is {ask.max_tokens}; this server writes at most {self.max_tokens}", param="max_tokens"
            )
        if room < (ask.max_tokens or 1):
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens and the answer may have {ask.max_tokens or 1}, but the context is "
                f"{self.context}",
                param="messages",
                code="context_length_exceeded",
            )
        found: dict[str, Any] = {"max_new_tokens": ask.max_tokens or min(room, self.max_tokens), "num_beams": 1}
        if ask.n > 1:
            found["num_return_sequences"] = ask.n
        sampling = dict(ask.sampling)
        if sampling.get("temperature", 1.0) < COLDEST:
            sampling = {name: value for name, value in sampling.items() if name not in DRAWING}
            found["do_sample"] = False
        elif "temperature" in sampling or any(sampling.get(name, off) != off for name, off in TRUNCATIONS.items()):
            found["do_sample"] = True
        return {**found, **sampling}

    async def _events(self, ask: Ask, request: Request) -> AsyncGenerator[Event, None]:
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[News]()
        try:
            ticket = self.worker.submit(request, lambda news: loop.call_soon_threadsafe(inbox.put_nowait, news), ask.n)
        except Full as error:
            raise full() from error
        except Closed as error:
            raise stopping() from error
        try:
            yield Started(request.inputs["input_ids"].shape[1])
            before = request.inputs["input_ids"][0, -CONTEXT:].tolist() if ask.continues else []
            writers = [Writer(i, self.tokenizer, self.model.tokens, ask.stops, ask.top, before) for i in range(ask.n)]
            writing = set(range(ask.n))
            while writing:
                news = await inbox.get()
                writer = writers[news.index]
                for event in writer.read(news):
                    yield event
                if writer.stopped and news.finish is None:
                    self.worker.cancel(ticket, news.index)
                if writer.stopped or news.finish is not None:
                    writing.discard(news.index)
                if not writer.stopped and news.finish in ("error", "cancelled"):
                    raise failed(news, ticket.answers[news.index].taken if ticket.answers else False)
        finally:
            self.worker.cancel(ticket)


def urls_of(ask: Ask) -> list[str]:
    """Where the images of a request are, in order."""
    return [part["url"] for turn in ask.messages for part in turn["content"] if part["type"] == "image"]


def policy_for(ask: Ask) -> str | Policy:
    """The policy of a request. A schedule is kept by all its choices; by chance, choice i draws from `seed + i`.

    Raises:
        ApiError: if the schedule has a look at an image that is not there.
    """
    policy = read_policy(ask.invocation, ask.seed)
    if isinstance(policy, Random):
        return policy.apart(ask.n)
    if not isinstance(policy, Forced):
        return policy
    if any(kind == "short" for _, _, kind in policy.schedule) and not urls_of(ask):
        message = "the schedule asks for short-term memory, but no message has an image"
        raise ApiError(400, message, param="vismem.invocation")
    return Forced([(row, step, kind) for row in range(ask.n) for _, step, kind in policy.schedule])


def full() -> ApiError:
    """More is waiting than may wait."""
    return ApiError(429, "too many requests are waiting; try again in a moment", headers={"Retry-After": "1"})


def failed(news: News, taken: bool) -> ApiError:
    """What became of a row, as an error: the client's where the request could not be taken, else ours."""
    if news.finish == "cancelled":
        return stopping()
    if isinstance(news.error, ValueError) and not taken:
        return ApiError(400, str(news.error))
    if isinstance(news.error, NonFiniteError):
        message = "the model's numbers for this answer are not finite; other answers are not affected"
        return ApiError(500, message, code="non_finite")
    if "out of memory" in str(news.error).lower():
        return ApiError(503, "the model ran out of memory; ask for less, or later", headers={"Retry-After": "5"})
    return ApiError(500, "the model failed while it wrote this answer; the server's log has the reason")
