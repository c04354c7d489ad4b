"""Answers chat requests with one model: messages become a prompt, the worker's updates become events.

Knows nothing of HTTP. `replicas.py` runs several engines in their own processes behind the same interface.
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
from vismem.deprecation import renamed, renamed_arguments
from vismem.model import VisMem
from vismem.serving.errors import ApiError, stopping
from vismem.serving.events import ChoiceStream, Ended, Event, Invoked, Started, TextDelta
from vismem.serving.pictures import PictureLimits, Pictures
from vismem.serving.prompts import chat_inputs, reserved_texts
from vismem.serving.worker import QueueFullError, RowUpdate, Worker, WorkerClosedError

__all__ = ["ChatEngine", "Ended", "Engine", "EngineRequest", "Event", "Invoked", "Load", "Started", "TextDelta"]

MAX_TOKEN_LENGTH = 16  # characters per token; natural text stays far below it on average
MIN_TEMPERATURE = 1e-3  # below it decoding is greedy, because logits divided by it may overflow
TRUNCATIONS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # and the values that turn them off
SAMPLING_ONLY = ("temperature", *TRUNCATIONS)  # settings without meaning in greedy decoding
CONTEXT = 8  # tokens of the prompt that the detokenizer sees before a continuation


@dataclass(frozen=True)
class EngineRequest:
    """A validated chat request, as plain values.

    Args:
        messages: each with "role", and "content": a list of {"type": "text", "text"} and {"type": "image", "url"}.
        n: number of choices; choice i is sampled with `seed + i`.
        seed: of the first choice.
        stops: strings that end a choice and are not part of it.
        top: number of likeliest tokens to report beside each log-probability; None reports no log-probabilities.
        invocation: the policy, as `read_policy` reads it.
        max_tokens: per choice, or None for the server's limit.
        sampling: `temperature`, `top_p`, ...; anything missing comes from the base's generation config.
        continues: continue the last message, which is the assistant's.
        opens_turn: start an assistant message after the given ones.
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
    """Number of rows waiting, and of rows being decoded."""

    waiting: int
    writing: int


class ChatEngine(Protocol):
    """What the server needs from `Engine` or `ReplicatedEngine`."""

    def answer(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        """Yields `Started`, then the events of all choices, interleaved, each choice up to its `Ended`.

        Closing the generator cancels the request.

        Raises:
            ApiError: if the request is refused or fails.
        """
        ...

    def load(self) -> Load:
        """How many rows there are."""
        ...

    def ready(self) -> bool:
        """Whether requests are accepted."""
        ...

    async def close(self, finish_within: float = 0.0) -> None:
        """Accepts no more requests, gives answers that many seconds to finish, and cancels the rest."""
        ...


class Engine:
    """One model, in this process.

    Args:
        model: the `VisMem`.
        batch_size: rows decoded at the same time.
        max_waiting: further rows that may wait.
        context: maximum tokens of a prompt and its answer; by default the base's context length.
        max_tokens: maximum tokens of an answer.
        pictures: limits on images and where they may be fetched from.
        **generation: generation keywords for all requests.
    """

    @renamed_arguments(most_waiting="max_waiting")
    def __init__(
        self,
        model: VisMem,
        batch_size: int = 16,
        max_waiting: int = 64,
        context: int | None = None,
        max_tokens: int = 4096,
        pictures: PictureLimits | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.max_tokens, self.pictures = model, max_tokens, Pictures(pictures or PictureLimits())
        self.context = context or context_of(model.base)
        self.worker = Worker(model, batch_size, max_waiting, **generation)
        self.tokenizer = copy.deepcopy(model.processor.tokenizer)  # the prompt thread uses the processor's own
        self.prompt_thread = ThreadPoolExecutor(1, thread_name_prefix="vismem-prompts")
        self.image_thread = ThreadPoolExecutor(1, thread_name_prefix="vismem-pictures")
        self.max_rows, self.preparing_rows = batch_size + max_waiting, 0  # rows whose prompts are being prepared
        self.reserved = reserved_texts(model)

    async def answer(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        """See `ChatEngine`."""
        batch_size = self.worker.queue.batch_size
        if request.n > batch_size:
            raise ApiError(
                400, f"n is {request.n}, but this server decodes at most {batch_size} rows at a time", param="n"
            )
        policy = policy_for(request)
        if self.preparing_rows + self.worker.rows + request.n > self.max_rows:
            raise queue_full()
        self.preparing_rows += request.n
        try:
            inputs = await self._prompt(request)
        finally:
            self.preparing_rows -= request.n
        generation = self._generation(request, inputs["input_ids"].shape[1])
        queued = Request(inputs, invocation=policy, seed=request.seed, generation=generation, top=request.top)
        async with aclosing(self._events(request, queued)) as events:
            async for event in events:
                yield event

    def load(self) -> Load:
        """See `ChatEngine`."""
        writing = self.worker.writing
        return Load(max(self.preparing_rows + self.worker.rows - writing, 0), writing)

    def ready(self) -> bool:
        """See `ChatEngine`."""
        return self.worker.alive and not self.worker.closing

    async def close(self, finish_within: float = 0.0) -> None:
        """See `ChatEngine`."""
        await asyncio.to_thread(self.worker.close, finish_within)
        for threads in (self.image_thread, self.prompt_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _prompt(self, request: EngineRequest) -> dict[str, Tensor]:
        """The processor's tensors for the messages, on the model's device."""
        # Templates join the texts of a message, some with its images elsewhere, so a token may come in several parts.
        texts = [
            "".join(part["text"] for part in message["content"] if part["type"] == "text")
            for message in request.messages
        ]
        if (size := sum(map(len, texts))) > MAX_TOKEN_LENGTH * self.context:  # before tokenizing, which takes long
            raise ApiError(
                400,
                f"the messages have {size} characters, too many for the context of {self.context} tokens",
                param="messages",
                code="context_length_exceeded",
            )
        for token in self.reserved:
            if any(token in text for text in texts):
                raise ApiError(400, f"a message contains the reserved token {token}; remove it", param="messages")
        files = await self.pictures.fetch(image_urls(request))
        loop = asyncio.get_running_loop()
        try:
            if files:
                return await loop.run_in_executor(self.image_thread, self._decode_and_encode, request, files)
            return await loop.run_in_executor(self.prompt_thread, self._encode, request, [])
        except RuntimeError as error:
            if not self.ready():
                raise stopping() from error
            raise

    def _decode_and_encode(self, request: EngineRequest, files: list[bytes]) -> dict[str, Tensor]:
        """Decodes images off the prompt thread, one request at a time, so that text requests are not blocked."""
        return self.prompt_thread.submit(self._encode, request, self.pictures.decode(files)).result()

    def _encode(self, request: EngineRequest, images: list[Image]) -> dict[str, Tensor]:
        remaining = iter(images)
        messages = [
            {
                "role": "system" if message["role"] == "developer" else message["role"],
                "content": [
                    {"type": "image", "image": next(remaining)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in request.messages
        ]
        try:
            return chat_inputs(self.model, messages, opens_turn=request.opens_turn, continues=request.continues)
        except Exception as error:  # templates and processors raise anything
            raise ApiError(400, f"the model's processor rejects these messages: {error}", param="messages") from error

    def _generation(self, request: EngineRequest, prompt: int) -> dict[str, Any]:
        """Generation keywords for a request with a prompt of that many tokens.

        Raises:
            ApiError: if the prompt and answer do not fit the context, or `max_tokens` exceeds the limit.
        """
        wanted, room = request.max_tokens, self.context - prompt
        if wanted is not None and wanted > self.max_tokens:
            raise ApiError(
                400, f"max_tokens is {wanted}; this server generates at most {self.max_tokens}", param="max_tokens"
            )
        if room < (wanted or 1):
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens and the answer may have {wanted or 1}, but the context is "
                f"{self.context} tokens",
                param="messages",
                code="context_length_exceeded",
            )
        generation: dict[str, Any] = {"max_new_tokens": wanted or min(room, self.max_tokens), "num_beams": 1}
        if request.n > 1:
            generation["num_return_sequences"] = request.n
        sampling = dict(request.sampling)
        if sampling.get("temperature", 1.0) < MIN_TEMPERATURE:
            sampling = {name: value for name, value in sampling.items() if name not in SAMPLING_ONLY}
            generation["do_sample"] = False
        elif "temperature" in sampling or any(sampling.get(name, off) != off for name, off in TRUNCATIONS.items()):
            generation["do_sample"] = True
        return {**generation, **sampling}

    async def _events(self, request: EngineRequest, queued: Request) -> AsyncGenerator[Event, None]:
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[RowUpdate]()
        try:
            ticket = self.worker.submit(
                queued, lambda update: loop.call_soon_threadsafe(inbox.put_nowait, update), request.n
            )
        except QueueFullError as error:
            raise queue_full() from error
        except WorkerClosedError as error:
            raise stopping() from error
        try:
            ids = queued.inputs["input_ids"]
            yield Started(ids.shape[1])
            before = ids[0, -CONTEXT:].tolist() if request.continues else []
            streams = [
                ChoiceStream(index, self.tokenizer, self.model.tokens, request.stops, request.top, before)
                for index in range(request.n)
            ]
            running = set(range(request.n))
            while running:
                update = await inbox.get()
                stream = streams[update.index]
                for event in stream.read(update):
                    yield event
                if stream.stopped and update.finish is None:
                    self.worker.cancel(ticket, update.index)
                if stream.stopped or update.finish is not None:
                    running.discard(update.index)
                if not stream.stopped and update.finish in ("error", "cancelled"):
                    raise row_error(update, started=bool(ticket.answers) and ticket.answers[update.index].taken)
        finally:
            self.worker.cancel(ticket)


def image_urls(request: EngineRequest) -> list[str]:
    """The URLs of a request's images, in order."""
    return [part["url"] for message in request.messages for part in message["content"] if part["type"] == "image"]


def policy_for(request: EngineRequest) -> str | Policy:
    """The policy of a request. All choices follow a schedule; a random policy uses `seed + i` for choice i.

    Raises:
        ApiError: if the schedule has a short-term invocation but there is no image.
    """
    policy = read_policy(request.invocation, request.seed)
    if isinstance(policy, Random):
        return policy.apart(request.n)
    if not isinstance(policy, Forced):
        return policy
    if any(kind == "short" for _, _, kind in policy.schedule) and not image_urls(request):
        message = "the schedule asks for short-term memory, but no message has an image"
        raise ApiError(400, message, param="vismem.invocation")
    return Forced([(row, step, kind) for row in range(request.n) for _, step, kind in policy.schedule])


def queue_full() -> ApiError:
    """Too many rows are waiting."""
    return ApiError(429, "too many requests are waiting; try again in a moment", headers={"Retry-After": "1"})


def row_error(update: RowUpdate, *, started: bool) -> ApiError:
    """The error of a row that failed or was cancelled. Before decoding has started, a ValueError is the client's."""
    if update.finish == "cancelled":
        return stopping()
    if isinstance(update.error, ValueError) and not started:
        return ApiError(400, str(update.error))
    if isinstance(update.error, NonFiniteError):
        message = "the model computed NaN or infinite values for this answer; other answers are not affected"
        return ApiError(500, message, code="non_finite")
    if "out of memory" in str(update.error).lower():
        message = "the model ran out of memory; send less, or try again later"
        return ApiError(503, message, headers={"Retry-After": "5"})
    return ApiError(500, "the model failed while generating this answer; the server's log has the reason")


__getattr__ = renamed(
    __name__,
    {"Answering": "ChatEngine", "Ask": "EngineRequest", "COLDEST": "MIN_TEMPERATURE", "Delta": "TextDelta"},
)
