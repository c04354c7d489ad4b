"""One model, many conversations: validates questions and submits them to the worker.

`session.py` holds the conversations, `page.py` the web page. Inspections run on demand in the worker's thread.
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

from vismem.analysis.inspection import Inspection, inspect_answer
from vismem.app.session import AnswerSettings, ChatError, Conversation, Reply, Side, Turn, one_line
from vismem.data.images import BadImageError, read_file
from vismem.decoding.policies import Policy
from vismem.decoding.prepare import context_of
from vismem.decoding.queue import Request
from vismem.deprecation import renamed
from vismem.loading import Loaded
from vismem.serving.engine import MIN_TEMPERATURE
from vismem.serving.errors import ApiError
from vismem.serving.pictures import PictureLimits, Pictures
from vismem.serving.prompts import chat_inputs, reserved_texts
from vismem.serving.worker import QueueFullError, Worker, WorkerClosedError

MAX_PICTURES = 8  # per conversation
MAX_PIXELS, MAX_TOTAL_PIXELS = 36_000_000, 72_000_000  # per picture, per conversation
MAX_VISITORS, MAX_KEPT_PIXELS = 256, 1_000_000_000  # over all conversations; the least recently used one is dropped
MAX_QUESTION = 8000  # characters
DECODE_LOCK = threading.Lock()  # decoding a picture takes many times its size, so one at a time
SHUTTING_DOWN = "The viewer is shutting down."


class Chat:
    """A model shared by many conversations, which decode in one live batch.

    Args:
        loaded: the model and its names.
        batch_size: number of answers decoded at a time.
        max_waiting: number of answers that may wait in the queue.

    Example:
        >>> chat = Chat(load_model())
        >>> turn = chat.ask(Conversation(), "Read row 1.", [picture])
        >>> turn.main.over.wait()
        >>> chat.inspect(turn, "memory").result().moments
    """

    def __init__(self, loaded: Loaded, batch_size: int = 16, max_waiting: int = 64) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.worker = Worker(self.model, batch_size, max_waiting, record=True)
        # Fast tokenizers are not thread-safe, and the worker uses the model's.
        self.processor, self.processor_lock = copy.deepcopy(self.model.processor), threading.Lock()
        self.context, self.markers = context_of(self.model.base), reserved_texts(self.model)
        self.visitors: OrderedDict[str, Conversation] = OrderedDict()
        self.visitors_lock, self.inspect_lock = threading.RLock(), threading.Lock()

    def conversation(self, visitor: str, *, new: bool = False) -> Conversation:
        """The visitor's conversation; `new` replaces it with an empty one."""
        with self.visitors_lock:
            if new:
                self.leave(visitor)
            if visitor not in self.visitors:
                self.visitors[visitor] = Conversation()
            self.visitors.move_to_end(visitor)
            pixels = sum(pixels_of(each.pictures) for each in self.visitors.values())
            while len(self.visitors) > MAX_VISITORS or (pixels > MAX_KEPT_PIXELS and len(self.visitors) > 1):
                oldest = next(iter(self.visitors))
                pixels -= pixels_of(self.visitors[oldest].pictures)
                self.leave(oldest)
            return self.visitors[visitor]

    def leave(self, visitor: str) -> None:
        """Drops a visitor's conversation and cancels its running answers."""
        with self.visitors_lock:
            dropped = self.visitors.pop(visitor, None)
        if dropped is not None and dropped.busy:
            self.stop(dropped.turns[-1])

    def leave_all(self) -> None:
        """Drops all conversations."""
        with self.visitors_lock:
            for visitor in list(self.visitors):
                self.leave(visitor)

    def by_key(self, key: str) -> Conversation | None:
        """The conversation with this export key, or None."""
        with self.visitors_lock:
            return next((each for each in self.visitors.values() if each.key == key), None)

    def ask(
        self,
        conversation: Conversation,
        question: str,
        pictures: Sequence[Image.Image] = (),
        settings: AnswerSettings | None = None,
    ) -> Turn:
        """Asks a question; the turn's answers grow as the worker decodes them.

        Raises:
            ChatError: if the question is refused; the conversation is then unchanged.
        """
        question, settings = question.strip(), settings or AnswerSettings()
        with self.processor_lock:
            seen = [*conversation.pictures, *pictures]
            self.check(conversation, question, seen)
            policy = settings.policy(has_image=bool(seen))
            turn = Turn(question, list(pictures), settings, seen=seen)
            inputs = self.prompt(conversation.messages(question, pictures))
            needed = inputs["input_ids"].shape[1] + settings.max_new_tokens
            if needed > self.context:
                raise ChatError(
                    f"The conversation is too long: with this answer it may reach {needed:,} tokens, and the model's "
                    f"context is {self.context:,}. Start a new one, or allow fewer tokens."
                )
            plan: list[tuple[Side, str | Policy]] = [("memory", policy)]
            if settings.compare and policy != "off":
                plan.insert(0, ("vanilla", "off"))
            try:
                for side, each in plan:
                    turn.replies.append(self.submit(side, each, inputs, settings))
            except (QueueFullError, WorkerClosedError) as error:
                self.stop(turn)
                busy = "The model is busy with other questions: ask again in a moment."
                raise ChatError(busy if isinstance(error, QueueFullError) else SHUTTING_DOWN) from error
            for reply in [reply for earlier in conversation.turns for reply in earlier.replies]:
                if reply.over.is_set() and not reply.inspectable:
                    reply.inputs, reply.ticket = {}, None  # large and not needed
            conversation.turns.append(turn)
            return turn

    def check(self, conversation: Conversation, question: str, seen: Sequence[Image.Image]) -> None:
        """Validates a question and all pictures seen so far. Raises ChatError."""
        if conversation.busy:
            raise ChatError("An answer is still being written: wait for it, or stop it first.")
        if not question:
            raise ChatError("The question is empty: type one, or pick an example.")
        if len(question) > MAX_QUESTION:
            raise ChatError(f"The question has {len(question):,} characters; the limit is {MAX_QUESTION:,}.")
        check_text(question)
        for marker in self.markers:
            if marker in question:
                raise ChatError(f"The question contains the model's special token {marker}: remove it.")
        check_count(len(seen))
        if pixels_of(seen) > MAX_TOTAL_PIXELS:
            raise too_many_pixels()

    def submit(self, side: Side, policy: str | Policy, inputs: dict[str, Tensor], settings: AnswerSettings) -> Reply:
        """Queues one answer. Raises QueueFullError or WorkerClosedError."""
        reply = Reply(side, self.model.processor.tokenizer, self.model.tokens)
        generation: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "num_beams": 1, "do_sample": False}
        if settings.temperature >= MIN_TEMPERATURE:
            generation |= {"do_sample": True, "temperature": settings.temperature}
        request = Request(dict(inputs), invocation=policy, seed=settings.seed, generation=generation)
        reply.inputs, reply.ticket = inputs, self.worker.submit(request, reply.receive)
        return reply

    def prompt(self, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The processor's tensors for these messages, on the model's device. Raises ChatError."""
        try:
            return chat_inputs(self.model, messages, self.processor)
        except Exception as error:  # templates and processors raise errors of any type
            raise ChatError(f"The model's processor rejects this: {one_line(error)}") from error

    def stop(self, turn: Turn) -> None:
        """Cancels a turn's running answers."""
        for reply in turn.replies:
            if reply.ticket is not None and not reply.over.is_set():
                self.worker.cancel(reply.ticket)

    def inspect(self, turn: Turn, side: str) -> Future[Inspection]:
        """Inspects a finished answer in the worker's thread; the result is kept.

        Raises:
            ChatError: if it is not finished, or has no invocation.
        """
        reply = next((reply for reply in turn.replies if reply.side == side), None)
        if reply is None or not reply.inspectable:
            raise ChatError("Nothing to inspect yet: wait until the answer is complete.")

        def run() -> Inspection:
            assert reply.ticket is not None  # `free` runs later
            return inspect_answer(self.model, reply.inputs, reply.ticket.answers[0].rollout, turn.seen)

        def free(future: Future[Inspection]) -> None:
            if not future.cancelled() and future.exception() is None:
                reply.inputs, reply.ticket = {}, None  # large, and no longer needed

        with self.inspect_lock:  # concurrent calls share one inspection
            if reply.inspection is None or reply.inspection.cancelled():
                try:
                    reply.inspection = self.worker.call(run)
                except WorkerClosedError as error:
                    raise ChatError(SHUTTING_DOWN) from error
                reply.inspection.add_done_callback(free)
            return reply.inspection

    def close(self) -> None:
        """Stops the worker, which ends running answers."""
        self.worker.close()


def read_pictures(paths: Sequence[Path], conversation: Conversation) -> list[Image.Image]:
    """Reads pictures within the conversation's limits, which are checked before decoding.

    Raises:
        ChatError: if a file is not a complete image, or there are too many pictures or pixels.
    """
    check_count(len(conversation.pictures) + len(paths))
    found: list[Image.Image] = []
    for path in paths:
        found.append(read_picture(path, MAX_TOTAL_PIXELS - pixels_of([*conversation.pictures, *found])))
    return found


def check_text(text: str) -> None:
    """Raises ChatError for text with an unpaired surrogate, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError("The text contains half a character (an unpaired surrogate): type it again.") from error


def too_many_pixels() -> ChatError:
    limit = f"{MAX_TOTAL_PIXELS:,} pixels in all"
    return ChatError(f"The images of a conversation may have {limit}: shrink them, or start a new one.")


def check_count(pictures: int) -> None:
    """Raises ChatError if a conversation may not have that many pictures."""
    if pictures > MAX_PICTURES:
        raise ChatError(f"That makes {pictures} images; a conversation may have {MAX_PICTURES}. Start a new one.")


def pixels_of(pictures: Sequence[Image.Image]) -> int:
    return sum(picture.width * picture.height for picture in pictures)


def read_picture(path: Path, pixels_left: int = MAX_TOTAL_PIXELS) -> Image.Image:
    """Reads a picture as `Pictures.decode` does, with at most `pixels_left` pixels.

    Raises:
        ChatError: if the file is not a complete image, or too large.
    """
    limits = PictureLimits(pixels=max(min(MAX_PIXELS, pixels_left), 1))
    try:
        with DECODE_LOCK:
            return Pictures(limits).decode([read_file(path)])[0]
    except BadImageError as error:
        raise ChatError(f"Image {path.name} is no longer available: upload it again.") from error
    except ApiError as error:
        if error.status == 413 and pixels_left < MAX_PIXELS:
            raise too_many_pixels() from error
        if error.status == 413:
            raise ChatError(f"Image {path.name} has more than {MAX_PIXELS:,} pixels, the limit; shrink it.") from error
        reason = error.message.removeprefix("an image cannot be used: ")
        raise ChatError(f"Image {path.name} cannot be used: {reason}.") from error


__getattr__ = renamed(__name__, {"Studio": "Chat"})
