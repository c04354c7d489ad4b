"""Conversations with one model, as data: settings, turns, and answers that grow while the worker decodes them.

`chat.py` validates and submits questions; `rendering.py` turns conversations into HTML.
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

from vismem.analysis.inspection import AnswerToken, Inspection, TokenReader, stopped
from vismem.decoding.markers import Piece, joined
from vismem.decoding.policies import Forced, Policy, read_policy, schedule_of
from vismem.decoding.trace import Invocation
from vismem.deprecation import renamed
from vismem.serving.protocol import bounded_policy
from vismem.serving.worker import Finish, RowUpdate, Ticket

Side = Literal["memory", "vanilla"]
MAX_TOKENS = 4096  # per answer


class ChatError(ValueError):
    """A refused question or event; the message is for the visitor."""


@dataclass(frozen=True)
class AnswerSettings:
    """How to answer a question.

    Args:
        invocation: the invocation policy, as `read_policy` reads it.
        compare: also write an answer without memory, from the same seed.
        temperature: 0 is greedy.
        seed: of sampling and of random invocations.
        max_new_tokens: per answer.
    """

    invocation: str = "learned"
    compare: bool = False
    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256

    def policy(self, *, has_image: bool) -> str | Policy:
        """Returns the policy. Raises ChatError if a setting is out of range, or needs an image and there is none."""
        if not 0 <= self.temperature <= 100:
            raise ChatError(f"The temperature must be between 0 and 100, not {self.temperature}.")
        if not 0 <= self.seed < 2**63:
            raise ChatError(f"The seed must be a whole number, 0 or more, not {self.seed}.")
        if not 1 <= self.max_new_tokens <= MAX_TOKENS:
            raise ChatError(f"An answer may have 1 to {MAX_TOKENS} tokens, not {self.max_new_tokens}.")
        try:
            policy = bounded_policy(self.invocation, self.seed)
        except ValueError as error:
            raise ChatError(f"Invalid invocation policy: {error}.") from error
        if isinstance(policy, Forced) and not has_image:
            for _, step, kind in policy.schedule:
                if kind == "short":
                    raise ChatError(f"short@{step} needs an image, and there is none: add one, or schedule long only.")
        return policy


class Reply:
    """One answer. It grows in the worker's thread and may be read from any thread.

    Args:
        side: `"memory"`, or `"vanilla"` for the answer without memory.
        tokenizer, tokens: the model's.
    """

    def __init__(self, side: Side, tokenizer: Any, tokens: Any) -> None:
        self.side, self.reader = side, TokenReader(tokenizer, tokens)
        self.tokens: list[AnswerToken] = []
        self.rest = ""  # of a character that was cut off
        self.invocations: list[Invocation] = []
        self.finish: Finish | None = None
        self.error: str | None = None
        self.started, self.seconds = time.perf_counter(), 0.0
        self.over = threading.Event()
        self.ticket: Ticket | None = None
        self.inputs: dict[str, Tensor] = {}
        self.inspection: Future[Inspection] | None = None

    @property
    def pieces(self) -> list[Piece]:
        """Text and invocations so far."""
        shown = [token for token in list(self.tokens) if token.part == "mark" or (token.part == "word" and token.text)]
        found = [Piece(token.text, token.kind, token.index) for token in shown]
        return joined([*found, Piece(self.rest)] if self.rest else found)

    @property
    def text(self) -> str:
        """Text so far, without invocation markers."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def sampled(self) -> int:
        """Number of tokens the model sampled, which excludes end tokens and forced invocations."""
        forced = sum(invocation.forced for invocation in self.invocations)
        return sum(token.part != "end" for token in list(self.tokens)) - forced

    @property
    def inspectable(self) -> bool:
        """Whether it is finished and has an invocation to inspect."""
        return self.over.is_set() and self.finish != "error" and bool(self.invocations)

    @property
    def inspected(self) -> Inspection | BaseException | None:
        """The finished inspection, or the error that it failed with."""
        if self.inspection is None or not self.inspection.done() or self.inspection.cancelled():
            return None
        return self.inspection.exception() or self.inspection.result()

    def receive(self, news: RowUpdate) -> None:
        """Appends what one decoding step produced; the worker's listener."""
        self.tokens += map(self.reader.read, news.tokens)
        self.invocations += news.invocations
        if news.finish is not None:
            self.tokens, self.rest = stopped(self.tokens), self.reader.words.end()
            self.seconds = time.perf_counter() - self.started
            self.error = error_message(news.error) if news.error is not None else None
            self.finish = news.finish
            self.over.set()


@dataclass(eq=False)
class Turn:
    """A question and its answers; the one without memory, if any, is first."""

    question: str
    pictures: list[Image.Image]
    settings: AnswerSettings
    replies: list[Reply] = field(default_factory=list)
    seen: list[Image.Image] = field(default_factory=list)  # all pictures of its prompt
    thumbnails: list[str] = field(default_factory=list)  # data URLs of its pictures, once rendered

    @property
    def main(self) -> Reply:
        """The answer that the conversation continues from."""
        return self.replies[-1]

    @property
    def over(self) -> bool:
        """Whether all answers are finished."""
        return all(reply.over.is_set() for reply in self.replies)

    @property
    def size(self) -> int:
        """A counter that grows with every token and every finished answer."""
        return sum(len(reply.tokens) + reply.over.is_set() for reply in self.replies)

    @property
    def unreached(self) -> int:
        """Number of invocations scheduled after the end of the answer."""
        if self.main.finish not in ("stop", "length"):
            return 0
        schedule = schedule_of(read_policy(self.settings.invocation, 0))
        return max(len(schedule) - len(self.main.invocations), 0)

    def reply(self, side: str) -> Reply:
        """The answer of that side. Raises StopIteration if there is none."""
        return next(reply for reply in self.replies if reply.side == side)


@dataclass(eq=False)
class Conversation:
    """One visitor's turns.

    Args:
        suggestions: follow-up questions to offer.
        selected: turn, side and index of the invocation whose panel is open.
        key: unguessable name of its export.
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
        """All pictures, oldest first."""
        return [picture for turn in self.turns for picture in turn.pictures]

    def turn_with(self, number: int, side: str, index: int) -> Turn:
        """The turn that has this invocation. Raises ChatError if there is none."""
        for turn in self.turns[number : number + 1]:
            if any(reply.side == side and index < len(reply.invocations) for reply in turn.replies):
                return turn
        raise ChatError("That invocation is gone: a new conversation was started.")

    def messages(self, question: str, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Chat messages that end with this question. A turn without an answer passes its pictures to the next."""
        found: list[dict[str, Any]] = []
        pending: list[Image.Image] = []
        for turn in self.turns:
            pending += turn.pictures
            if turn.main.text.strip():
                found += [message("user", turn.question, pending), message("assistant", turn.main.text)]
                pending = []
        return [*found, message("user", question, [*pending, *pictures])]


def message(role: str, text: str, pictures: Sequence[Image.Image] = ()) -> dict[str, Any]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


def error_message(error: BaseException) -> str:
    """Why decoding failed, in one line for the visitor."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return (
            "The model ran out of memory: use fewer or smaller images, allow fewer tokens, or start a new conversation."
        )
    if isinstance(error, ValueError):
        return f"The model rejects this: {one_line(error)}"
    return f"The model failed while writing this ({one_line(error)}). See the terminal for details."


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


__getattr__ = renamed(__name__, {"Refused": "ChatError", "Settings": "AnswerSettings"})
