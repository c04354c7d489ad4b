"""Turns a worker's updates into the chunks of a streamed response, and chunks into a whole response.

Stop strings are searched for in the text, so they may start and end inside a token. Text that could be the start of a
stop string is held back until that is decided.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from vismem.decoding.detokenizer import Detokenizer, special_ids
from vismem.decoding.trace import Invocation, Top
from vismem.deprecation import renamed
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
    InvocationTrace,
    TokenLogprob,
    TopLogprob,
    Trace,
    Usage,
)
from vismem.serving.worker import RowUpdate
from vismem.tokens import MemoryTokens

DONE = b"data: [DONE]\n\n"
MIN_LOGPROB = -9999.0  # JSON has no minus infinity
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a single byte in SentencePiece vocabularies
BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # in byte-level vocabularies
ANCHOR = "a"  # decoded before a token, because the first token of a text may lose its leading space


@dataclass
class ChoiceStream:
    """Turns the updates of one row into what is new in one choice."""

    index: int
    tokenizer: Any
    tokens: MemoryTokens
    usage: Usage  # of the whole request; the tokens of this choice are added to it
    stops: Sequence[str] = ()
    top: int | None = None  # as `ChatRequest.top`
    before: Sequence[int] = ()  # the prompt's last tokens, if the text continues it
    stopped: bool = field(default=False, init=False)  # a stop string was found

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer(self.tokenizer, self.before)
        self.token_bytes = None if self.top is None else TokenBytes(self.tokenizer)
        self.end_ids, self.special = set(self.tokens.end_ids.values()), special_ids(self.tokenizer)
        self.first = self.special.issuperset(self.before)  # whether the next token starts its text
        self.held, self.emitted = "", 0  # text held back, and characters emitted
        self.logprobs: list[tuple[int, TokenLogprob]] = []  # not yet emitted, by the offset of their token's text
        self.position = 0

    def read(self, update: RowUpdate) -> Iterator[ChunkChoice]:
        """What an update adds to the choice; after a stop string only the end, then nothing."""
        if self.stopped:
            return
        invocations = iter(update.invocations)
        for at, token in enumerate(update.tokens):
            top, offset = (update.tops[at] if update.tops else None), self.length
            if token in self.tokens.kind_of:
                yield self._invoked(next(invocations), top)
            elif token in self.end_ids:
                self.usage.memory.invocation_tokens += 1
            else:
                self.usage.completion_tokens += 1
                self.usage.total_tokens += 1
                self.held += self.detokenizer.put(token)
                if token not in self.special:
                    if self.token_bytes is not None and top is not None:
                        self.logprobs.append((offset, token_logprob(token, top, self.token_bytes, first=self.first)))
                    self.first = False
                yield from self._emit()
            self.position += 1
            if self.stopped:
                yield self._ended("stop")
                return
        if update.finish in ("stop", "length"):
            self.held += self.detokenizer.end()
            yield from self._emit(last=True)
            yield self._ended("stop" if self.stopped else update.finish)

    @property
    def length(self) -> int:
        """Number of characters so far, including those held back."""
        return self.emitted + len(self.held)

    def _emit(self, *, last: bool = False) -> Iterator[ChunkChoice]:
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.stopped, cut = True, min(places)
        else:
            cut = len(self.held) - (0 if last else partial_stop_length(self.held, self.stops))
        text, self.held = self.held[:cut], "" if self.stopped else self.held[cut:]
        self.emitted += cut
        # At the end this includes tokens without text, such as a leading space that the tokenizer drops.
        ready = [entry for offset, entry in self.logprobs if offset < self.emitted or (last and not self.stopped)]
        self.logprobs = self.logprobs[len(ready) :]
        if text or ready:
            logprobs = None if self.top is None else ChoiceLogprobs(content=ready)
            yield ChunkChoice(index=self.index, delta=Delta(content=text), logprobs=logprobs)

    def _invoked(self, invocation: Invocation, top: Top | None) -> ChunkChoice:
        memory = self.usage.memory
        memory.invocation_tokens += 1
        vectors = f"{invocation.kind}_vectors"
        setattr(memory, vectors, getattr(memory, vectors) + invocation.length)
        trace = InvocationTrace(
            kind=invocation.kind,
            position=self.position,
            offset=self.length,
            length=invocation.length,
            forced=invocation.forced,
            logprob=None if top is None else top.log_prob,
        )
        return ChunkChoice(index=self.index, delta=Delta(), vismem=Trace(invocations=[trace]))

    def _ended(self, finish: FinishReason) -> ChunkChoice:
        return ChunkChoice(index=self.index, delta=Delta(), finish_reason=finish)


def partial_stop_length(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a stop string."""
    lengths = (
        length
        for stop in stops
        for length in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:length])
    )
    return max(lengths, default=0)


class TokenBytes:
    """The bytes that tokens stand for; the bytes of consecutive tokens join to the bytes of their text.

    Example:
        >>> token_bytes = TokenBytes(processor.tokenizer)
        >>> b"".join(token_bytes(token, first=at == 0) for at, token in enumerate(ids)).decode()
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = set(getattr(tokenizer, "added_tokens_decoder", ()))
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        steps = json.loads(decoder.__getstate__()) if decoder is not None else {}
        self.byte_level = any(step.get("type") == "ByteLevel" for step in (steps, *steps.get("decoders", ())))
        self.anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
        self.anchor_text = tokenizer.decode(self.anchor)

    def __call__(self, token: int, *, first: bool = False) -> bytes | None:
        """A token's bytes, or None if they are unknown. Some vocabularies drop the leading space of a text's first."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embeddings beyond the vocabulary
            return b""
        if token not in self.added:
            if self.byte_level and all(letter in BYTE_OF for letter in piece):
                return bytes(BYTE_OF[letter] for letter in piece)
            if not self.byte_level and (byte := BYTE_TOKEN.fullmatch(piece)):
                return bytes([int(byte[1], 16)])
        text: str = self.tokenizer.decode([token])
        if not first and (both := self.tokenizer.decode([*self.anchor, token])).startswith(self.anchor_text):
            text = both[len(self.anchor_text) :]
        return None if "\ufffd" in text and "\ufffd" not in piece else text.encode()


def token_logprob(token: int, top: Top, token_bytes: TokenBytes, *, first: bool) -> TokenLogprob:
    """A token's log-probability, and those of the likeliest tokens in its place.

    Bytes that are not valid text on their own, such as part of a character, appear as `\\xe2` in the token's text.
    """

    def entry(token: int, log_prob: float) -> TopLogprob:
        own = token_bytes(token, first=first)
        text = "\ufffd" if own is None else own.decode("utf-8", "backslashreplace")
        return TopLogprob(token=text, logprob=max(log_prob, MIN_LOGPROB), bytes=None if own is None else list(own))

    own = entry(token, top.log_prob)
    return TokenLogprob(**own.model_dump(), top_logprobs=[entry(*each) for each in top.likeliest])


async def whole(chunks: AsyncGenerator[ChatChunk, None], request: ChatRequest) -> ChatCompletion:
    """Joins the chunks of an answer."""
    choices = [
        Choice(
            index=index,
            message=AnswerMessage(content=""),
            logprobs=None if request.top is None else ChoiceLogprobs(content=[]),
            finish_reason="stop",
            vismem=Trace(invocations=[]) if request.vismem.trace else None,
        )
        for index in range(request.n)
    ]
    first = await anext(chunks)
    async for chunk in chunks:
        for part in chunk.choices:
            choice = choices[part.index]
            choice.message.content += part.delta.content or ""
            choice.finish_reason = part.finish_reason or choice.finish_reason
            if choice.logprobs and part.logprobs:
                choice.logprobs.content += part.logprobs.content
            if choice.vismem and part.vismem:
                choice.vismem.invocations += part.vismem.invocations
    same = first.model_dump(include={"id", "created", "model", "vismem"})
    return ChatCompletion(**same, choices=choices, usage=chunk.usage)


async def server_sent(chunks: AsyncGenerator[ChatChunk, None], request: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The chunks of an answer as server-sent events, with the parts that the client asked for."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if request.vismem.trace or not any(choice.vismem for choice in chunk.choices):
                value = chunk.model_dump(exclude={"usage"}, exclude_none=True)
                for choice in value["choices"]:
                    choice.setdefault("finish_reason", None)
                yield event(value)
    if request.stream_options.include_usage:
        yield event(chunk.model_copy(update={"choices": []}).model_dump(exclude_none=True))
    yield DONE


def event(value: Any) -> bytes:
    """A value as one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


__getattr__ = renamed(__name__, {"Writer": "ChoiceStream"})
