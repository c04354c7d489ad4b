"""Conversations with one model, as data: settings, questions, and answers that grow while a worker writes them.

What is asked is checked and put to the worker by `studio.py`; what it looks like is for `rendering.py`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vismem.analysis.findings import AnswerToken, Inspection
from vismem.analysis.inspection import answer_tokens
from vismem.decoding.detokenizer import Detokenizer
from vismem.decoding.markers import Piece, joined
from vismem.decoding.policies import Forced, Policy, read_policy, schedule_of
from vismem.decoding.trace import Invocation
from vismem.serving.protocol import bounded_policy
from vismem.serving.worker import Finish, RowUpdate, Ticket

Side = Literal["memory", "vanilla"]
MOST_TOKENS = 4096  # of an answer


class Refused(ValueError):
    """What was asked cannot be done; the message is for the one who asked."""


@dataclass(frozen=True)
class Settings:
    """How a question is to be answered.

    Args:
        invocation: who invokes memory, as `read_policy` reads it.
        compare: write a second answer without memory beside it, from the same seed.
        temperature: 0 always takes the likeliest token.
        seed: of sampling and of random invocations.
        max_new_tokens: of an answer.
    """

    invocation: str = "learned"
    compare: bool = False
    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256

    def policy(self, sighted: bool) -> str | Policy:
        """The policy, once all settings were found good.

        Args:
            sighted: whether there is a picture.

        Raises:
            Refused: if a setting is out of range, or short-term memory is forced where there is no picture.
        """
        if not 0 <= self.temperature <= 100:
            raise Refused(f"The temperature must be between 0 and 100, not {self.temperature}.")
        if not 0 <= self.seed < 2**63:
            raise Refused(f"The seed must be a whole number of 0 or more, not {self.seed}.")
        if not 1 <= self.max_new_tokens <= MOST_TOKENS:
            raise Refused(f"An answer may have 1 to {MOST_TOKENS} tokens, not {self.max_new_tokens}.")
        try:
            policy = bounded_policy(self.invocation, self.seed)
        except ValueError as error:
            raise Refused(f"The invocation cannot be read: {error}.") from error
        if isinstance(policy, Forced) and not sighted:
            for _, step, kind in policy.schedule:
                if kind == "short":
                    raise Refused(
                        f"short@{step} asks for a look at a picture, and there is none: add one, or schedule long only."
                    )
        return policy


class Reply:
    """One answer; it grows in the worker's thread, and is read in any.

    Args:
        side: `"memory"`, or `"vanilla"` beside it.
        tokenizer, tokens: of the model.
    """

    def __init__(self, side: Side, tokenizer: Any, tokens: Any) -> None:
        self.side, self.tokenizer, self.marks = side, tokenizer, tokens
        self.words, self.ends = Detokenizer(tokenizer), set(tokens.end_ids.values())
        self.written: list[Piece] = []
        self.tokens: list[int] = []
        self.invocations: list[Invocation] = []
        self.strip: list[AnswerToken] = []  # its tokens with their texts, once it is done
        self.finish: Finish | None = None
        self.trouble: str | None = None
        self.begun, self.seconds = time.perf_counter(), 0.0
        self.over = threading.Event()
        self.ticket: Ticket | None = None
        self.inputs: dict[str, Tensor] = {}
        self.inspection: Future[Inspection] | None = None

    @property
    def pieces(self) -> list[Piece]:
        """Words and marks so far."""
        return joined(list(self.written))

    @property
    def text(self) -> str:
        """The words so far, without marks."""
        return "".join(piece.text for piece in list(self.written))

    @property
    def sampled(self) -> int:
        """Tokens that the model sampled; end tokens and forced invocations are none."""
        forced = sum(one.forced for one in self.invocations)
        return sum(token not in self.ends for token in list(self.tokens)) - forced

    @property
    def inspectable(self) -> bool:
        """Whether there is something to look into."""
        return self.over.is_set() and self.finish != "error" and bool(self.invocations)

    def tidy(self) -> None:
        """Lets go what only an inspection would need, where there will be none."""
        if self.over.is_set() and not self.inspectable:
            self.inputs, self.ticket = {}, None

    def read(self, news: RowUpdate) -> None:
        """Takes the news of a step, as a worker's listener."""
        for token in news.tokens:
            if token in self.marks.kind_of:
                self.written.append(Piece("", self.marks.kind_of[token], sum(p.kind is not None for p in self.written)))
            elif token not in self.ends and (text := self.words.put(token)):
                self.written.append(Piece(text))
        self.invocations += news.invocations
        self.tokens += news.tokens
        if news.finish is not None:
            if text := self.words.end():
                self.written.append(Piece(text))
            self.strip = answer_tokens(self.tokens, self.tokenizer, self.marks)
            self.seconds = time.perf_counter() - self.begun
            self.trouble = trouble(news.error) if news.error is not None else None
            self.finish = news.finish
            self.over.set()


@dataclass(eq=False)
class Turn:
    """A question and its answers, the one without memory first where there are two."""

    question: str
    pictures: list[Image.Image]
    settings: Settings
    replies: list[Reply] = field(default_factory=list)
    seen: list[Image.Image] = field(default_factory=list)  # all pictures of its prompt
    thumbnails: list[str] = field(default_factory=list)  # of its pictures, once they were shown

    @property
    def main(self) -> Reply:
        """The answer that the conversation goes on from."""
        return self.replies[-1]

    @property
    def over(self) -> bool:
        """Whether all is written."""
        return all(reply.over.is_set() for reply in self.replies)

    @property
    def size(self) -> int:
        """Grows with every token, and with every end."""
        return sum(len(reply.tokens) + reply.over.is_set() for reply in self.replies)

    @property
    def unreached(self) -> int:
        """Scheduled invocations that the answer ended before."""
        schedule = schedule_of(read_policy(self.settings.invocation, 0))
        done = self.main.finish in ("stop", "length")
        return max(len(schedule) - len(self.main.invocations), 0) if done else 0

    def reply(self, side: str) -> Reply:
        """The answer of that side. Raises KeyError if there is none."""
        sides: dict[str, Reply] = {reply.side: reply for reply in self.replies}
        return sides[side]


@dataclass(eq=False)
class Conversation:
    """What one visitor asked and was answered.

    Args:
        suggestions: questions that may be asked next.
        selected: turn, side and index of the invocation whose panel is open.
    """

    turns: list[Turn] = field(default_factory=list)
    suggestions: list[str] = field(default_factory=list)
    selected: tuple[int, str, int] | None = None
    key: str = field(default_factory=partial(secrets.token_urlsafe, 16))

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return bool(self.turns) and not self.turns[-1].over

    @property
    def pictures(self) -> list[Image.Image]:
        """All pictures, in the order in which they were shown."""
        return [picture for turn in self.turns for picture in turn.pictures]

    def invocation(self, number: int, side: str, index: int) -> tuple[Turn, str, Invocation]:
        """One invocation: its turn, the answer's side, and itself.

        Raises:
            Refused: if there is none.
        """
        if 0 <= number < len(self.turns):
            for reply in self.turns[number].replies:
                if reply.side == side and 0 <= index < len(reply.invocations):
                    return self.turns[number], side, reply.invocations[index]
        raise Refused("That invocation is gone: the conversation was begun anew.")

    def messages(self, question: str, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Chat messages that end with this question. A turn without an answer leaves its pictures to the next."""
        found: list[dict[str, Any]] = []
        shown: list[Image.Image] = []
        for turn in self.turns:
            shown += turn.pictures
            if turn.main.text.strip():
                found += [said("user", turn.question, shown), said("assistant", turn.main.text)]
                shown = []
        return [*found, said("user", question, [*shown, *pictures])]


def said(role: str, text: str, pictures: Sequence[Image.Image] = ()) -> dict[str, Any]:
    """A chat message."""
    shown = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def trouble(error: BaseException) -> str:
    """What went wrong while an answer was written, in one line for the one who asked."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "The model ran out of memory: use smaller or fewer images, ask for less, or start a new conversation."
    if isinstance(error, ValueError):
        return f"The model does not take this: {one_line(error)}"
    return f"The model failed while it wrote this ({one_line(error)}). The terminal has the details."


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
