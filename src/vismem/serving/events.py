"""Turns the tokens of a choice into events: text, log-probabilities, memory invocations, and the end.

Stop strings are searched for in the text, so they may start and end inside a token. Text that could be the start of a
stop string is held back until that is decided.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from vismem.decoding.detokenizer import Detokenizer, special_ids
from vismem.decoding.trace import Invocation, Top
from vismem.deprecation import renamed
from vismem.serving.protocol import FinishReason, InvocationTrace, MemoryUsage, TokenLogprob, TopLogprob
from vismem.serving.worker import RowUpdate
from vismem.tokens import MemoryTokens

MIN_LOGPROB = -9999.0  # JSON has no minus infinity
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a single byte in SentencePiece vocabularies
BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # in byte-level vocabularies
ANCHOR = "a"  # decoded before a token, because the first token of a text may lose its leading space


@dataclass(frozen=True)
class Started:
    """The prompt was accepted.

    Args:
        prompt_tokens: its length, including image tokens.
    """

    prompt_tokens: int


@dataclass(frozen=True)
class TextDelta:
    """New text of a choice, with the log-probabilities of its tokens if requested."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Invoked:
    """Memory was invoked in a choice."""

    index: int
    invocation: InvocationTrace


@dataclass(frozen=True)
class Ended:
    """A choice is complete.

    Args:
        completion_tokens: sampled text tokens, including the end token but no memory tokens.
        memory: tokens and vectors used by memory.
    """

    index: int
    finish: FinishReason
    completion_tokens: int
    memory: MemoryUsage


Event = Started | TextDelta | Invoked | Ended


@dataclass
class ChoiceStream:
    """Turns the updates of one row into events.

    Args:
        index: of the choice.
        tokenizer: the processor's.
        tokens: `model.tokens`.
        stops: strings that end the text and are not part of it.
        top: number of likeliest tokens to report beside each log-probability; None reports no log-probabilities.
        before: the prompt's last tokens, if the text continues it.
    """

    index: int
    tokenizer: Any
    tokens: MemoryTokens
    stops: Sequence[str] = ()
    top: int | None = None
    before: Sequence[int] = ()
    stopped: bool = field(default=False, init=False)  # a stop string was found

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer(self.tokenizer, self.before)
        self.token_bytes = None if self.top is None else TokenBytes(self.tokenizer)
        self.end_ids, self.special = set(self.tokens.end_ids.values()), special_ids(self.tokenizer)
        self.first = self.special.issuperset(self.before)  # whether the next token starts its text
        self.held, self.emitted = "", 0  # text held back, and characters emitted
        self.logprobs: list[tuple[int, TokenLogprob]] = []  # not yet emitted, by the offset of their token's text
        self.position = self.count = 0
        self.memory = MemoryUsage()

    def read(self, update: RowUpdate) -> Iterator[Event]:
        """The events of an update. After a stop string there is only `Ended`, and then nothing."""
        if self.stopped:
            return
        invocations = iter(update.invocations)
        for at, token in enumerate(update.tokens):
            top, offset = (update.tops[at] if update.tops else None), self.length
            if token in self.tokens.kind_of:
                yield self._invoked(next(invocations), top)
            elif token in self.end_ids:
                self.memory.invocation_tokens += 1
            else:
                self.count += 1
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

    def _emit(self, *, last: bool = False) -> Iterator[TextDelta]:
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
            yield TextDelta(self.index, text, None if self.top is None else ready)

    def _invoked(self, invocation: Invocation, top: Top | None) -> Invoked:
        self.memory.invocation_tokens += 1
        vectors = f"{invocation.kind}_vectors"
        setattr(self.memory, vectors, getattr(self.memory, vectors) + invocation.length)
        trace = InvocationTrace(
            kind=invocation.kind,
            position=self.position,
            offset=self.length,
            length=invocation.length,
            forced=invocation.forced,
            logprob=None if top is None else top.log_prob,
        )
        return Invoked(self.index, trace)

    def _ended(self, finish: FinishReason) -> Ended:
        return Ended(self.index, finish, self.count, self.memory)


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

    Args:
        tokenizer: the processor's.

    Example:
        >>> token_bytes = TokenBytes(processor.tokenizer)
        >>> b"".join(token_bytes(token, first=at == 0) for at, token in enumerate(ids)).decode()
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = set(getattr(tokenizer, "added_tokens_decoder", ()))
        self.byte_level = "ByteLevel" in decoder_steps(tokenizer)
        self.anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
        self.anchor_text = tokenizer.decode(self.anchor)

    def __call__(self, token: int, *, first: bool = False) -> bytes | None:
        """The token's bytes, or None if they are unknown.

        Args:
            token: its id.
            first: whether it starts its text; some vocabularies drop a leading space there.
        """
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embeddings beyond the vocabulary
            return b""
        if token not in self.added:
            if self.byte_level and all(letter in BYTE_OF for letter in piece):
                return bytes(BYTE_OF[letter] for letter in piece)
            if not self.byte_level and (byte := BYTE_TOKEN.fullmatch(piece)):
                return bytes([int(byte[1], 16)])
        text = self._text(token, first=first)
        return None if "\ufffd" in text and "\ufffd" not in piece else text.encode()

    def _text(self, token: int, *, first: bool) -> str:
        if not first:
            both: str = self.tokenizer.decode([*self.anchor, token])
            if both.startswith(self.anchor_text):
                return both[len(self.anchor_text) :]
        return self.tokenizer.decode([token])


def decoder_steps(tokenizer: Any) -> set[str]:
    """The types of a tokenizer's decoding steps, as the tokenizers library names them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return {step["type"] for step in (state, *state.get("decoders", ())) if "type" in step}


def token_logprob(token: int, top: Top, token_bytes: TokenBytes, *, first: bool) -> TokenLogprob:
    """A token's log-probability, and those of the likeliest tokens in its place.

    Bytes that are no valid text on their own, such as part of a character, appear as `\\xe2` in the token's text.
    """

    def entry(token: int, log_prob: float) -> TopLogprob:
        own = token_bytes(token, first=first)
        text = "\ufffd" if own is None else own.decode("utf-8", "backslashreplace")
        return TopLogprob(token=text, logprob=max(log_prob, MIN_LOGPROB), bytes=None if own is None else list(own))

    own = entry(token, top.log_prob)
    return TokenLogprob(**own.model_dump(), top_logprobs=[entry(*each) for each in top.likeliest])


__getattr__ = renamed(__name__, {"Delta": "TextDelta", "Writer": "ChoiceStream"})
