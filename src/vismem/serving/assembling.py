"""Requests as what an engine is asked, and an engine's events as what OpenAI's clients read: one piece, or chunks."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from vismem.serving.engine import Ask
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
from vismem.serving.writing import Delta as New
from vismem.serving.writing import Ended, Event, Invoked, Started

DONE = b"data: [DONE]\n\n"
DRAWN = -1  # as a seed: one that is drawn, as without any


def ask_of(request: ChatRequest, invocation: str) -> Ask:
    """What an engine is asked; without a seed in the request one is drawn.

    Args:
        request: the request.
        invocation: who invokes memory.
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
    turns = [turn_of(message) for message in request.messages]
    # After an empty last turn nothing is to be continued: a new turn begins with the same tokens.
    continues = bool(request.continue_final_message and turns[-1]["content"][0]["text"])
    if request.continue_final_message and not continues:
        turns.pop()
    return Ask(
        messages=turns,
        n=request.n or 1,
        seed=random.SystemRandom().randrange(2**53) if request.seed in (None, DRAWN) else request.seed,
        stops=tuple(request.stops),
        top=(request.top_logprobs or 0) if request.logprobs else None,
        invocation=invocation,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        sampling=sampling,
        continues=continues,
        opens_turn=not continues
        and (bool(request.continue_final_message) or request.add_generation_prompt is not False),
    )


def turn_of(message: Message) -> dict[str, Any]:
    """A turn as processors take it, with addresses in the places of images. An assistant's words are one text."""
    content = message.content or message.refusal or ""
    given = [content] if isinstance(content, str) else content
    parts = [
        {"type": "image", "url": part.url} if isinstance(part, ImagePart) else {"type": "text", "text": words_of(part)}
        for part in given
    ]
    if message.role == "assistant":
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    return {"role": message.role, "content": parts}


def words_of(part: TextPart | RefusalPart | str) -> str:
    """The text of a part."""
    if isinstance(part, str):
        return part
    return part.refusal if isinstance(part, RefusalPart) else part.text


@dataclass
class Parts:
    """What there is of one choice."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    invocations: list[InvocationTrace] = field(default_factory=list)
    finish: FinishReason = "stop"


class Assembly:
    """One answer on its way out.

    Args:
        request: what was asked over the wire.
        ask: what the engine was asked.
    """

    def __init__(self, request: ChatRequest, ask: Ask) -> None:
        self.request, self.ask = request, ask
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.traced = request.traced
        self.prompt_tokens = self.completion_tokens = 0
        self.memory = MemoryUsage()

    @property
    def provenance(self) -> Provenance:
        """How to get the same answer again."""
        return Provenance(seed=self.ask.seed, invocation=self.ask.invocation)

    @property
    def usage(self) -> Usage:
        """What was counted so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            memory=self.memory,
        )

    def count(self, event: Event) -> None:
        """Adds what an event says to the usage."""
        if isinstance(event, Started):
            self.prompt_tokens = event.prompt_tokens
        elif isinstance(event, Ended):
            self.completion_tokens += event.completion_tokens
            for name, value in event.memory.model_dump().items():
                setattr(self.memory, name, getattr(self.memory, name) + value)

    async def whole(self, events: AsyncGenerator[Event, None]) -> ChatCompletion:
        """The answer in one piece."""
        parts = [Parts() for _ in range(self.ask.n)]
        async for event in events:
            self.count(event)
            if isinstance(event, New):
                parts[event.index].text.append(event.text)
                parts[event.index].logprobs += event.logprobs or []
            elif isinstance(event, Invoked):
                parts[event.index].invocations.append(event.invocation)
            elif isinstance(event, Ended):
                parts[event.index].finish = event.finish
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(content="".join(part.text)),
                logprobs=None if self.ask.top is None else ChoiceLogprobs(content=part.logprobs),
                finish_reason=part.finish,
                vismem=Trace(invocations=part.invocations) if self.traced else None,
            )
            for index, part in enumerate(parts)
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
        """The answer as server-sent events, without the last one that says it is done."""
        async for event in events:
            self.count(event)
            if isinstance(event, Started):
                begun = [ChunkChoice(index=i, delta=Delta(role="assistant", content="")) for i in range(self.ask.n)]
                for choice in begun:
                    yield self.chunk(choice, vismem=self.provenance if choice.index == 0 else None)
            elif isinstance(event, New):
                logprobs = None if event.logprobs is None else ChoiceLogprobs(content=event.logprobs)
                yield self.chunk(ChunkChoice(index=event.index, delta=Delta(content=event.text), logprobs=logprobs))
            elif isinstance(event, Invoked) and self.traced:
                trace = Trace(invocations=[event.invocation])
                yield self.chunk(ChunkChoice(index=event.index, delta=Delta(), vismem=trace))
            elif isinstance(event, Ended):
                yield self.chunk(ChunkChoice(index=event.index, delta=Delta(), finish_reason=event.finish))
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield self.chunk(usage=self.usage)

    def chunk(self, *choices: ChunkChoice, usage: Usage | None = None, vismem: Provenance | None = None) -> bytes:
        """One server-sent event."""
        made = ChatChunk(
            id=self.id,
            created=self.created,
            model=self.request.model,
            choices=list(choices),
            usage=usage,
            vismem=vismem,
        )
        found = made.model_dump(exclude_none=True)
        for choice in found["choices"]:
            choice.setdefault("finish_reason", None)
        return server_sent(found)


def server_sent(value: Any) -> bytes:
    """A value as one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
