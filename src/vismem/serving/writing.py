"""One choice in the making: tokens go in; text, log-probabilities and invocations come out as events.

Stop strings are looked for in the text, so they may begin and end anywhere in a token; text that may yet turn out to
be the start of one is held back until that is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vismem.decoding.detokenizer import Detokenizer, special_ids
from vismem.decoding.trace import Top
from vismem.serving.protocol import FinishReason, InvocationTrace, MemoryUsage, TokenLogprob, TopLogprob
from vismem.serving.token_bytes import TokenBytes
from vismem.serving.worker import News
from vismem.tokens import MemoryTokens


@dataclass(frozen=True)
class Started:
    """The prompt was taken.

    Args:
        prompt_tokens: its length, images included.
    """

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """New text of a choice, with its tokens' log-probabilities where they were asked for."""

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
    """A choice is done.

    Args:
        completion_tokens: words sampled, an end token included; memory tokens are not.
        memory: what memory took.
    """

    index: int
    finish: FinishReason
    completion_tokens: int
    memory: MemoryUsage


Event = Started | Delta | Invoked | Ended


@dataclass
class Writer:
    """Turns the news of one row into events.

    Args:
        index: of the choice.
        tokenizer: of the processor.
        tokens: `model.tokens`.
        stops: strings that end the text and are not part of it.
        top: how many likeliest tokens were asked for beside each word's log-probability, or None.
        before: the prompt's last tokens, where the text continues it.
    """

    index: int
    tokenizer: Any
    tokens: MemoryTokens
    stops: Sequence[str] = ()
    top: int | None = None
    before: Sequence[int] = ()
    stopped: bool = field(default=False, init=False)  # a stop string was met

    def __post_init__(self) -> None:
        self.words = Detokenizer(self.tokenizer, self.before)
        self.spell = None if self.top is None else TokenBytes(self.tokenizer)
        self.end_ids, self.special = set(self.tokens.end_ids.values()), special_ids(self.tokenizer)
        self.first = self.special.issuperset(self.before)  # whether the next word is the first of its text
        self.held, self.given = "", 0  # text that is not given out yet, and how much was
        self.entries: list[tuple[int, TokenLogprob]] = []  # and log-probabilities, by where their token's text begins
        self.position = self.count = 0
        self.memory = MemoryUsage()

    def read(self, news: News) -> Iterator[Event]:
        """The events that a step's news are; none after a stop string but the end."""
        if self.stopped:
            return
        invocations = iter(news.invocations)
        for at, token in enumerate(news.tokens):
            top, before = (news.tops[at] if news.tops else None), self.length
            if token in self.tokens.kind_of:
                yield self._invoked(next(invocations), top)
            elif token in self.end_ids:
                self.memory.invocation_tokens += 1
            else:
                self.count += 1
                self.held += self.words.put(token)
                if token not in self.special:
                    if self.spell is not None and top is not None:
                        self.entries.append((before, entry_of(token, top, self.spell, self.first)))
                    self.first = False
                yield from self._give(last=False)
            self.position += 1
            if self.stopped:
                yield self._ended("stop")
                return
        if news.finish in ("stop", "length"):
            self.held += self.words.end()
            yield from self._give(last=True)
            yield self._ended("stop" if self.stopped else news.finish)

    @property
    def length(self) -> int:
        """Characters so far, those held back included."""
        return self.given + len(self.held)

    def _give(self, last: bool) -> Iterator[Delta]:
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.stopped, cut = True, min(places)
        else:
            cut = len(self.held) - (0 if last else longest_start(self.held, self.stops))
        text, self.held = self.held[:cut], "" if self.stopped else self.held[cut:]
        self.given += cut
        # At the end those too that add no text, as a space that is dropped where a text begins.
        ready = [entry for place, entry in self.entries if place < self.given or (last and not self.stopped)]
        self.entries = self.entries[len(ready) :]
        if text or ready:
            yield Delta(self.index, text, None if self.top is None else ready)

    def _invoked(self, invocation: Any, top: Top | None) -> Invoked:
        self.memory.invocation_tokens += 1
        vectors = f"{invocation.kind}_vectors"
        setattr(self.memory, vectors, getattr(self.memory, vectors) + invocation.length)
        told = InvocationTrace(
            kind=invocation.kind,
            position=self.position,
            offset=self.length,
            length=invocation.length,
            forced=invocation.forced,
            logprob=None if top is None else top.log_prob,
        )
        return Invoked(self.index, told)

    def _ended(self, finish: FinishReason) -> Ended:
        return Ended(self.index, finish, self.count, self.memory)


LOWEST = -9999.0  # JSON has no minus infinity


def entry_of(token: int, top: Top, spell: TokenBytes, first: bool) -> TokenLogprob:
    """A word's log-probability, and those of the likeliest tokens in its place.

    Bytes that are no text by themselves, as parts of a character are, have `\\xe2` and the like in the token's text.
    """

    def one(token: int, log_prob: float) -> TopLogprob:
        own = spell(token, first=first)
        text = "\ufffd" if own is None else own.decode("utf-8", "backslashreplace")
        return TopLogprob(token=text, logprob=max(log_prob, LOWEST), bytes=None if own is None else list(own))

    own = one(token, top.log_prob)
    return TokenLogprob(**own.model_dump(), top_logprobs=[one(*each) for each in top.likeliest])


def longest_start(text: str, stops: Sequence[str]) -> int:
    """How many last characters of a text may be the start of a stop string."""
    lengths = (
        length
        for stop in stops
        for length in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:length])
    )
    return max(lengths, default=0)
