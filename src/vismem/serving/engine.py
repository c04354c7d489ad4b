"""Answers chat requests with one model: messages become a prompt, the worker's updates become chunks.

Knows nothing of HTTP. `replicas.py` runs several engines in their own processes behind the same interface.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from vismem.decoding.output import NonFiniteError
from vismem.decoding.policies import Forced, Policy, Random, read_policy
from vismem.decoding.prepare import context_of
from vismem.decoding.queue import Request
from vismem.deprecation import renamed, renamed_arguments
from vismem.model import VisMem
from vismem.serving.errors import ApiError, stopping
from vismem.serving.pictures import PictureLimits, Pictures
from vismem.serving.prompts import chat_inputs, reserved_texts
from vismem.serving.protocol import ChatChunk, ChatRequest, ChunkChoice, Delta, MemoryUsage, Provenance, Usage
from vismem.serving.responses import ChoiceStream
from vismem.serving.worker import QueueFullError, RowUpdate, Worker, WorkerClosedError

MAX_TOKEN_LENGTH = 16  # characters per token; natural text stays far below it on average
MIN_TEMPERATURE = 1e-3  # below it decoding is greedy, because logits divided by it may overflow
TRUNCATIONS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # and the values that turn them off
SAMPLING = {"temperature", "repetition_penalty", *TRUNCATIONS}  # a request's generation keywords
CONTEXT = 8  # tokens of the prompt that the detokenizer sees before a continuation


@dataclass(frozen=True)
class Load:
    """Numbers of rows waiting and being decoded."""

    waiting: int
    writing: int


class ChatEngine(Protocol):
    """What the server needs from `Engine` or `ReplicatedEngine`."""

    def answer(self, request: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
        """Yields a first chunk of each choice, then what is new, each choice up to its `finish_reason`.

        Closing the generator cancels the request.

        Raises:
            ApiError: if the request is refused or fails.
        """

    def load(self) -> Load:
        """How many rows there are."""

    def ready(self) -> bool:
        """Whether requests are accepted."""

    async def close(self, finish_within: float = 0.0) -> None:
        """Refuses new requests, gives answers `finish_within` seconds to finish, and cancels the rest."""


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

    Example:
        >>> request = ChatRequest(model="any", messages=[{"role": "user", "content": "What is on the shelf?"}])
        >>> async for chunk in Engine(model).answer(request):
        ...     print(chunk.choices[0].delta.content or "", end="")
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

    async def answer(self, request: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
        """See `ChatEngine`. Ignores `request.model`; without a policy, memory is invoked as learned."""
        rows, batch_size = request.n, self.worker.queue.batch_size
        if rows > batch_size:
            raise ApiError(400, f"n is {rows}, but this server decodes at most {batch_size} rows at a time", param="n")
        seed = random.SystemRandom().randrange(2**53) if request.seed is None else request.seed
        provenance = Provenance(seed=seed, invocation=request.vismem.invocation or "learned")
        policy = policy_for(request, provenance)
        if self.preparing_rows + self.worker.rows + rows > self.max_rows:
            raise queue_full()
        self.preparing_rows += rows
        try:
            inputs = await self._prompt(request)
        finally:
            self.preparing_rows -= rows
        ids = inputs["input_ids"]
        generation = self._generation(request, length := ids.shape[1])
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[RowUpdate]()
        try:
            ticket = self.worker.submit(
                Request(inputs, policy, seed, generation, top=request.top),
                lambda update: loop.call_soon_threadsafe(inbox.put_nowait, update),
                rows,
            )
        except QueueFullError as error:
            raise queue_full() from error
        except WorkerClosedError as error:
            raise stopping() from error

        usage = Usage(prompt_tokens=length, completion_tokens=0, total_tokens=length, memory=MemoryUsage())
        name, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        chunk = partial(ChatChunk, id=name, created=created, model=request.model, usage=usage)
        before = ids[0, -CONTEXT:].tolist() if request.continues else []
        tokenizer, tokens = self.tokenizer, self.model.tokens
        streams = [
            ChoiceStream(index, tokenizer, tokens, usage, request.stops, request.top, before) for index in range(rows)
        ]
        try:
            for index in range(rows):
                first = ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
                yield chunk(choices=[first], vismem=provenance if index == 0 else None)
            running = set(range(rows))
            while running:
                update = await inbox.get()
                stream = streams[update.index]
                for choice in stream.read(update):
                    yield chunk(choices=[choice])
                if stream.stopped and update.finish is None:
                    self.worker.cancel(ticket, update.index)
                if stream.stopped or update.finish is not None:
                    running.discard(update.index)
                if not stream.stopped and update.finish in ("error", "cancelled"):
                    raise row_error(update, started=bool(ticket.answers) and ticket.answers[update.index].taken)
        finally:
            self.worker.cancel(ticket)

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

    async def _prompt(self, request: ChatRequest) -> dict[str, Tensor]:
        """The processor's tensors for the messages, on the model's device."""
        messages: list[dict[str, Any]] = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.parts}
            for message in request.messages
        ]
        if request.continue_final_message and not request.continues:
            messages.pop()  # it is empty, and a new message starts with the same tokens
        # Templates join a message's texts, some moving its images elsewhere, so a token may be split over parts.
        texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
        if (size := sum(map(len, texts))) > MAX_TOKEN_LENGTH * self.context:  # before tokenizing, which is slow
            raise ApiError(
                400,
                f"the messages have {size} characters, too many for the context of {self.context} tokens",
                param="messages",
                code="context_length_exceeded",
            )
        for token in self.reserved:
            if any(token in text for text in texts):
                raise ApiError(400, f"a message contains the reserved token {token}; remove it", param="messages")
        files = await self.pictures.fetch(request.image_urls)
        thread, work = (self.image_thread, self._decode) if files else (self.prompt_thread, self._encode)
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work, request, messages, files)
        except RuntimeError as error:
            if not self.ready():
                raise stopping() from error
            raise

    def _decode(self, request: ChatRequest, messages: list[dict[str, Any]], files: list[bytes]) -> dict[str, Tensor]:
        """Decodes images off the prompt thread, one request at a time, so that text requests are not blocked."""
        images = self.pictures.decode(files)
        return self.prompt_thread.submit(self._encode, request, messages, images).result()

    def _encode(self, request: ChatRequest, messages: list[dict[str, Any]], images: list[Any]) -> dict[str, Tensor]:
        remaining = iter(images)
        for message in messages:
            message["content"] = [
                {"type": "image", "image": next(remaining)} if part["type"] == "image" else part
                for part in message["content"]
            ]
        continues = request.continues
        opens_turn = not continues and (request.continue_final_message or request.add_generation_prompt)
        try:
            return chat_inputs(self.model, messages, opens_turn=opens_turn, continues=continues)
        except Exception as error:  # templates and processors raise anything
            raise ApiError(400, f"the model's processor rejects these messages: {error}", param="messages") from error

    def _generation(self, request: ChatRequest, prompt: int) -> dict[str, Any]:
        """Generation keywords for a request with a prompt of that many tokens.

        Raises:
            ApiError: if the prompt and answer do not fit the context, or `max_tokens` exceeds the limit.
        """
        wanted, room = request.max_completion_tokens or request.max_tokens, self.context - prompt
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
        generation = request.model_dump(include=SAMPLING, exclude_none=True)
        if generation.get("temperature", 1.0) < MIN_TEMPERATURE:
            generation = {name: value for name, value in generation.items() if name == "repetition_penalty"}
            generation["do_sample"] = False
        elif "temperature" in generation or any(generation.get(name, off) != off for name, off in TRUNCATIONS.items()):
            generation["do_sample"] = True
        if request.ignore_eos:
            generation["eos_token_id"] = None
        return {
            **generation,
            "max_new_tokens": wanted or min(room, self.max_tokens),
            "num_beams": 1,
            "num_return_sequences": request.n,
        }


def policy_for(request: ChatRequest, provenance: Provenance) -> str | Policy:
    """The policy of a request. All choices follow the same schedule; a random policy uses `seed + i` for choice i.

    Raises:
        ApiError: if the schedule has a short-term invocation but there is no image.
    """
    policy = read_policy(provenance.invocation, provenance.seed)
    if isinstance(policy, Random):
        return policy.apart(request.n)
    if not isinstance(policy, Forced):
        return policy
    if any(kind == "short" for _, _, kind in policy.schedule) and not request.image_urls:
        message = "the schedule asks for short-term memory, but no message has an image"
        raise ApiError(400, message, param="vismem.invocation")
    return Forced([(row, step, kind) for row in range(request.n) for _, step, kind in policy.schedule])


def queue_full() -> ApiError:
    """Too many rows are waiting."""
    return ApiError(429, "too many requests are waiting; try again in a moment")


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
        return ApiError(503, "the model ran out of memory; send less, or try again later")
    return ApiError(500, "the model failed while generating this answer; the server's log has the reason")


__getattr__ = renamed(
    __name__,
    {"Answering": "ChatEngine", "Ask": "ChatRequest", "COLDEST": "MIN_TEMPERATURE", "EngineRequest": "ChatRequest"},
)
