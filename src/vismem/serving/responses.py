"""Converts chat requests to engine requests, and an engine's events to OpenAI responses: whole, or streamed chunks."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from vismem.serving.engine import EngineRequest
from vismem.serving.events import Ended, Event, Invoked, Started, TextDelta
from vismem.serving.protocol import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    ImagePart,
    InvocationTrace,
    MemoryUsage,
    Message,
    Provenance,
    RefusalPart,
    TextPart,
    TokenLogprob,
    Trace,
    Usage,
)

DONE = b"data: [DONE]\n\n"
RANDOM_SEED = -1  # what clients send to have a seed picked


def engine_request(request: ChatRequest, invocation: str) -> EngineRequest:
    """The engine's form of a chat request. Picks a seed if the request has none.

    Args:
        request: the request.
        invocation: the policy, as `read_policy` reads it.
    """
    sampling = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if (value := getattr(request, name)) is not None
    }
    if sampling.get("top_k") == -1:  # off, which transformers writes as 0
        sampling["top_k"] = 0
    if request.ignore_eos:
        sampling["eos_token_id"] = None
    messages = [chat_message(message) for message in request.messages]
    # An empty last message has nothing to continue; a new message starts with the same tokens.
    continues = bool(request.continue_final_message and messages[-1]["content"][0]["text"])
    if request.continue_final_message and not continues:
        messages.pop()
    return EngineRequest(
        messages=messages,
        n=request.n or 1,
        seed=random.SystemRandom().randrange(2**53) if request.seed in (None, RANDOM_SEED) else request.seed,
        stops=tuple(request.stops),
        top=(request.top_logprobs or 0) if request.logprobs else None,
        invocation=invocation,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        sampling=sampling,
        continues=continues,
        opens_turn=not continues
        and (bool(request.continue_final_message) or request.add_generation_prompt is not False),
    )


def chat_message(message: Message) -> dict[str, Any]:
    """A message as chat templates take it, with URLs in place of images. An assistant's parts become one text."""
    content = message.content or message.refusal or ""
    given = [content] if isinstance(content, str) else content
    parts = [
        {"type": "image", "url": part.url} if isinstance(part, ImagePart) else {"type": "text", "text": part_text(part)}
        for part in given
    ]
    if message.role == "assistant":
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    return {"role": message.role, "content": parts}


def part_text(part: TextPart | RefusalPart | str) -> str:
    """The text of a part."""
    if isinstance(part, str):
        return part
    return part.refusal if isinstance(part, RefusalPart) else part.text


@dataclass
class CollectedChoice:
    """A choice so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    invocations: list[InvocationTrace] = field(default_factory=list)
    finish: FinishReason = "stop"


class ResponseBuilder:
    """Builds the response of one request, and counts its tokens.

    Args:
        request: the client's request.
        engine_request: what the engine was given.
    """

    def __init__(self, request: ChatRequest, engine_request: EngineRequest) -> None:
        self.request, self.engine_request = request, engine_request
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.prompt_tokens = self.completion_tokens = 0
        self.memory = MemoryUsage()

    @property
    def provenance(self) -> Provenance:
        """What reproduces the answer."""
        return Provenance(seed=self.engine_request.seed, invocation=self.engine_request.invocation)

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            memory=self.memory,
        )

    def count(self, event: Event) -> None:
        """Adds an event to the usage."""
        if isinstance(event, Started):
            self.prompt_tokens = event.prompt_tokens
        elif isinstance(event, Ended):
            self.completion_tokens += event.completion_tokens
            for name, value in event.memory.model_dump().items():
                setattr(self.memory, name, getattr(self.memory, name) + value)

    async def completion(self, events: AsyncGenerator[Event, None]) -> ChatCompletion:
        """The whole answer."""
        collected = [CollectedChoice() for _ in range(self.engine_request.n)]
        async for event in events:
            self.count(event)
            if isinstance(event, TextDelta):
                collected[event.index].text.append(event.text)
                collected[event.index].logprobs += event.logprobs or []
            elif isinstance(event, Invoked):
                collected[event.index].invocations.append(event.invocation)
            elif isinstance(event, Ended):
                collected[event.index].finish = event.finish
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(content="".join(choice.text)),
                logprobs=None if self.engine_request.top is None else ChoiceLogprobs(content=choice.logprobs),
                finish_reason=choice.finish,
                vismem=Trace(invocations=choice.invocations) if self.request.traced else None,
            )
            for index, choice in enumerate(collected)
        ]
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.request.model,
            choices=choices,
            usage=self.usage,
            vismem=self.provenance,
        )

    async def chunks(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, without the closing `DONE`."""
        async for event in events:
            self.count(event)
            if isinstance(event, Started):
                for index in range(self.engine_request.n):
                    first = ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
                    yield self.chunk(first, vismem=self.provenance if index == 0 else None)
            elif isinstance(event, TextDelta):
                logprobs = None if event.logprobs is None else ChoiceLogprobs(content=event.logprobs)
                yield self.chunk(ChunkChoice(index=event.index, delta=Delta(content=event.text), logprobs=logprobs))
            elif isinstance(event, Invoked) and self.request.traced:
                trace = Trace(invocations=[event.invocation])
                yield self.chunk(ChunkChoice(index=event.index, delta=Delta(), vismem=trace))
            elif isinstance(event, Ended):
                yield self.chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=event.finish))
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield self.chunk(usage=self.usage)

    def chunk(self, *choices: ChunkChoice, usage: Usage | None = None, vismem: Provenance | None = None) -> bytes:
        """A chunk as a server-sent event."""
        chunk = ChatChunk(
            id=self.id,
            created=self.created,
            model=self.request.model,
            choices=list(choices),
            usage=usage,
            vismem=vismem,
        ).model_dump(exclude_none=True)
        for choice in chunk["choices"]:
            choice.setdefault("finish_reason", None)
        return server_sent(chunk)


def server_sent(value: Any) -> bytes:
    """A value as one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
