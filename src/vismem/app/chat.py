"""A model that many conversations take turns with: what is asked is checked and put to its worker.

Conversations themselves are `session.py`'s, pages `page.py`'s. What happened at an invocation is found by
`inspection.py`, in the worker's thread, when somebody asks for it.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from vismem.analysis.findings import Inspection
from vismem.analysis.inspection import inspect_answer
from vismem.app.session import Conversation, Refused, Reply, Settings, Side, Turn, one_line
from vismem.data.images import BadImageError, read_file
from vismem.decoding.policies import Policy
from vismem.decoding.prepare import context_of
from vismem.decoding.queue import Request
from vismem.loading import Loaded
from vismem.serving.engine import MIN_TEMPERATURE
from vismem.serving.errors import ApiError
from vismem.serving.pictures import PictureLimits, Pictures
from vismem.serving.prompts import chat_inputs, reserved_texts
from vismem.serving.worker import QueueFullError, Worker, WorkerClosedError

MOST_PICTURES = 8  # of a conversation
MOST_PIXELS, ALL_PIXELS = 36_000_000, 72_000_000  # of a picture, of a conversation's
MOST_VISITORS, KEPT_PIXELS = 256, 1_000_000_000  # conversations and their pixels that are kept; the oldest goes first
LONGEST_QUESTION = 8000  # characters
DECODING = threading.Lock()


class Studio:
    """A model that conversations take turns with, all in one live batch.

    Args:
        loaded: the model and its names.
        batch_size: answers that are written at a time.
        most_waiting: answers that may wait beside them.

    Example:
        >>> studio = Studio(load_model())
        >>> turn = studio.ask(Conversation(), "Read row 1.", [picture])
        >>> turn.main.over.wait()
        >>> studio.inspect(turn, "memory").result().moments
    """

    def __init__(self, loaded: Loaded, batch_size: int = 16, most_waiting: int = 64) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.worker = Worker(self.model, batch_size, most_waiting, record=True)
        # Fast tokenizers are not to be used by two threads at a time: the model's is the worker's.
        self.processor, self.asking = copy.deepcopy(self.model.processor), threading.Lock()
        self.context, self.marks = context_of(self.model.base), reserved_texts(self.model)
        self.visitors: OrderedDict[str, Conversation] = OrderedDict()
        self.visiting, self.looking = threading.RLock(), threading.Lock()  # events come in threads of their own

    def conversation(self, visitor: str, new: bool = False) -> Conversation:
        """A visitor's conversation; with `new` a fresh one in its place."""
        with self.visiting:
            if new:
                self.leave(visitor)
            if visitor not in self.visitors:
                self.visitors[visitor] = Conversation()
            self.visitors.move_to_end(visitor)
            pixels = sum(pixels_of(each.pictures) for each in self.visitors.values())
            while len(self.visitors) > MOST_VISITORS or (pixels > KEPT_PIXELS and len(self.visitors) > 1):
                oldest = next(iter(self.visitors))
                pixels -= pixels_of(self.visitors[oldest].pictures)
                self.leave(oldest)
            return self.visitors[visitor]

    def leave(self, visitor: str) -> None:
        """Forgets a visitor's conversation, and stops what is being written for it."""
        with self.visiting:
            gone = self.visitors.pop(visitor, None)
        if gone is not None and gone.busy:
            self.stop(gone.turns[-1])

    def leave_all(self) -> None:
        """Forgets all conversations."""
        with self.visiting:
            for visitor in list(self.visitors):
                self.leave(visitor)

    def by_key(self, key: str) -> Conversation | None:
        """The conversation that is exported by that key, if it is still there."""
        with self.visiting:
            return next((each for each in self.visitors.values() if each.key == key), None)

    def ask(
        self,
        conversation: Conversation,
        question: str,
        pictures: Sequence[Image.Image] = (),
        settings: Settings | None = None,
    ) -> Turn:
        """Puts a question; the answers of the turn grow while the worker writes them.

        Raises:
            Refused: if it cannot be asked; the conversation is then as it was.
        """
        question, settings = question.strip(), settings or Settings()
        with self.asking:  # one at a time, as the processor takes them
            policy = settings.policy(self.check(conversation, question, pictures))
            turn = Turn(question, list(pictures), settings, seen=[*conversation.pictures, *pictures])
            inputs = self.prompt(conversation.messages(question, pictures))
            room = self.context - inputs["input_ids"].shape[1] - settings.max_new_tokens
            if room < 0:
                raise Refused(
                    f"The conversation is too long: with this answer it could have {self.context - room:,} tokens, and "
                    f"the model takes {self.context:,}. Start a new one, or ask for a shorter answer."
                )
            plan: list[tuple[Side, str | Policy]] = [("memory", policy)]
            if settings.compare and policy != "off":
                plan.insert(0, ("vanilla", "off"))
            try:
                for side, each in plan:
                    turn.replies.append(self.begin(side, each, inputs, settings))
            except (QueueFullError, WorkerClosedError) as error:
                self.stop(turn)
                waits = "The model is busy with other questions: ask again in a moment."
                raise Refused(waits if isinstance(error, QueueFullError) else "The viewer is being stopped.") from error
            for earlier in conversation.turns:
                for reply in earlier.replies:
                    reply.tidy()
            conversation.turns.append(turn)
            return turn

    def check(self, conversation: Conversation, question: str, pictures: Sequence[Image.Image]) -> bool:
        """Whether the question has a picture to look at, once it was found fit to be asked. Raises Refused."""
        if conversation.busy:
            raise Refused("An answer is still being written: wait for it, or stop it first.")
        if not question:
            raise Refused("The question is empty: type one, or pick an example.")
        if len(question) > LONGEST_QUESTION:
            raise Refused(f"The question has {len(question):,} characters; {LONGEST_QUESTION:,} is the limit.")
        check_text(question)
        for mark in self.marks:
            if mark in question:
                raise Refused(f"The question has the model's own mark {mark} in it: leave that out.")
        seen = [*conversation.pictures, *pictures]
        check_count(len(seen))
        if pixels_of(seen) > ALL_PIXELS:
            raise too_many_pixels()
        return bool(seen)

    def begin(self, side: Side, policy: str | Policy, inputs: dict[str, Tensor], settings: Settings) -> Reply:
        """Queues one answer. Raises QueueFullError or WorkerClosedError."""
        reply = Reply(side, self.model.processor.tokenizer, self.model.tokens)
        generation: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "num_beams": 1, "do_sample": False}
        if settings.temperature >= MIN_TEMPERATURE:
            generation |= {"do_sample": True, "temperature": settings.temperature}
        request = Request(dict(inputs), invocation=policy, seed=settings.seed, generation=generation)
        reply.inputs, reply.ticket = inputs, self.worker.submit(request, reply.read)
        return reply

    def prompt(self, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The processor's tensors for a conversation, on the model's device.

        Raises:
            Refused: if the processor does not take it.
        """
        try:
            return chat_inputs(self.model, messages, self.processor)
        except Exception as error:  # templates and processors raise what they like
            raise Refused(f"The model's processor does not take this: {one_line(error)}") from error

    def stop(self, turn: Turn) -> None:
        """Gives up what is being written of a turn."""
        for reply in turn.replies:
            if reply.ticket is not None and not reply.over.is_set():
                self.worker.cancel(reply.ticket)

    def inspect(self, turn: Turn, side: str) -> Future[Inspection]:
        """What happened in a finished answer; found once, in the worker's thread.

        Raises:
            Refused: if there is no such answer, or nothing to see in it.
        """
        reply = next((reply for reply in turn.replies if reply.side == side), None)
        if reply is None or not reply.inspectable:
            raise Refused("There is nothing to look into yet: wait until the answer is written.")

        def find() -> Inspection:
            assert reply.ticket is not None  # until it was looked into
            return inspect_answer(self.model, reply.inputs, reply.ticket.answers[0].rollout, turn.seen)

        def forget(future: Future[Inspection]) -> None:
            if not future.cancelled() and future.exception() is None:
                reply.inputs, reply.ticket = {}, None  # large, and of no more use

        with self.looking:  # two who look at once are to find one inspection
            if reply.inspection is None or reply.inspection.cancelled():
                try:
                    reply.inspection = self.worker.call(find)
                except WorkerClosedError as error:
                    raise Refused("The viewer is being stopped.") from error
                reply.inspection.add_done_callback(forget)
            return reply.inspection

    def close(self) -> None:
        """Stops the worker; answers that are being written end here."""
        self.worker.close()


def read_pictures(files: Sequence[tuple[str | Path, str]], conversation: Conversation) -> list[Image.Image]:
    """Pictures that a conversation is to have, each by path and name; none is decoded that it may not have.

    Raises:
        Refused: if one is no whole image, or they are too many or too large.
    """
    check_count(len(conversation.pictures) + len(files))
    found: list[Image.Image] = []
    for path, name in files:
        found.append(read_picture(path, name, ALL_PIXELS - pixels_of([*conversation.pictures, *found])))
    return found


def check_text(text: str) -> None:
    """Raises Refused if it has half a character in it, which can be neither read nor shown."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("The text has half a character in it, which cannot be read: type it anew.") from error


def too_many_pixels() -> Refused:
    """What is said where a conversation's pictures are too large together."""
    most = f"{ALL_PIXELS:,} pixels in all"
    return Refused(f"The images of a conversation may have {most}: make them smaller, or start a new one.")


def check_count(pictures: int) -> None:
    """Raises Refused if those are too many for a conversation."""
    if pictures > MOST_PICTURES:
        raise Refused(f"That makes {pictures} images; a conversation may have {MOST_PICTURES}. Start a new one.")


def pixels_of(pictures: Sequence[Image.Image]) -> int:
    """Pixels of all of them."""
    return sum(picture.width * picture.height for picture in pictures)


def read_picture(path: str | Path, name: str | None = None, left: int = ALL_PIXELS) -> Image.Image:
    """Reads a picture from a file as `Pictures.decode` does, with its limits.

    Args:
        path: where it lies.
        name: what its owner calls it.
        left: pixels that its conversation may still have.

    Raises:
        Refused: if it is no whole image, or too large.
    """
    name = name or Path(path).name
    try:
        with DECODING:  # one at a time: while it is decoded a picture takes many times its size
            return Pictures(PictureLimits(pixels=max(min(MOST_PIXELS, left), 1))).decode([read_file(Path(path))])[0]
    except BadImageError as error:
        raise Refused(f"Image {name} is no longer here: drop it in again.") from error
    except ApiError as error:
        if error.status == 413 and left < MOST_PIXELS:
            raise too_many_pixels() from error
        if error.status == 413:
            raise Refused(f"Image {name} has more than {MOST_PIXELS:,} pixels, the limit; make it smaller.") from error
        reason = error.message.removeprefix("an image cannot be used: ")
        raise Refused(f"Image {name} cannot be used: {reason}.") from error
