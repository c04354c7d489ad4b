"""Conversations about shelves: several turns, images before or after the question, shown once or again.

`sample_conversation` asks one target question at a chosen distance from its image, for evaluation and for training a
memory. It returns a `Conversation`, whose `messages` are in the chat format of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from vismem.pocket.tasks import TASKS, Question, ask, compare, describe, difference
from vismem.pocket.world import SIDE, Scene, change_one_price, render_array, sample_scene

FILLER_TASKS = ("colour", "shape", "digit", "label", "item", "row", "sum")
# What a description may say before a late question without giving its answer away.
DESCRIPTION_BEFORE = dict.fromkeys(("colour", "shape", "colours", "shapes", "describe_tags"), "prices")


@dataclass
class Turn:
    """One exchange."""

    user: list[str | int]  # texts and image numbers in reading order
    question: Question
    since: int | None = 0  # turns since an image was last shown; None: never


@dataclass
class Conversation:
    """Turns about one or more pictures. The last turn's question is the target."""

    turns: list[Turn]
    pictures: list[np.ndarray]  # each uint8 [64, 64, 3]; `Turn.user` refers to them by index
    scenes: list[Scene | None] = field(default_factory=list)  # beside `pictures`; None for easy-VQA
    distance: int = 0

    @property
    def task(self) -> str:
        return self.turns[-1].question.task

    @property
    def answer_text(self) -> str:
        """The reference reply to the last turn, with its steps."""
        return self.turns[-1].question.reply

    @property
    def answer(self) -> str:
        """The result alone, what `tasks.score` compares with."""
        return self.turns[-1].question.answer

    @property
    def scene(self) -> Scene | None:
        """The scene that was shown last."""
        return self.scenes[self._order[-1]] if self._order else None

    @property
    def _order(self) -> list[int]:
        return [part for turn in self.turns for part in turn.user if isinstance(part, int)]

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures in the order in which `messages` shows them (a picture shown twice is here twice)."""
        return [Image.fromarray(self.pictures[index]) for index in self._order]

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Chat messages that end with the last turn's question; the pictures are apart, in `images`, as in a `Row`."""
        found = []
        for turn in self.turns:
            parts = [{"type": "image"} if isinstance(p, int) else {"type": "text", "text": p} for p in turn.user]
            reply = {"type": "text", "text": turn.question.reply}
            found += [{"role": "user", "content": parts}, {"role": "assistant", "content": [reply]}]
        return found[:-1]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """`prompt` with the pictures in it."""
        images, found = iter(self.images), self.prompt
        for part in (part for message in found for part in message["content"] if part["type"] == "image"):
            part["image"] = next(images)
        return found


def arrange(rng: Random, text: str, images: list[int]) -> list[str | int]:
    """The images before the question (mostly) or after it; the question alone if there are none."""
    if not images:
        return [text]
    return [*images, text] if rng.random() < 0.65 else [text, *images]


def ask_pair(task: str, rng: Random, split: str) -> tuple[list[Scene], Question]:
    """Two shelves and a question about both."""
    first = sample_scene(rng, split)
    if task == "compare":
        second = sample_scene(rng, split)
        return [first, second], compare(first, second, rng)
    second = change_one_price(first, rng.randrange(SIDE), rng.randrange(SIDE), rng, split)
    return [first, second], difference(first, second, rng)


def sample_conversation(
    rng: Random,
    split: str = "train",
    task: str | None = None,
    distance: int = 0,
    *,
    shown_again: bool = False,
    rule: str = "stated",
    after_description: bool = False,
    labels: tuple[str, ...] | None = None,
) -> Conversation:
    """A conversation whose last turn asks `task`.

    Args:
        rng: all randomness comes from here.
        split: whose handwriting, "train" or "test".
        task: one of `tasks.TASKS`; None draws one.
        distance: turns between the image and the question; 0 shows it in the question's own turn.
        shown_again: show the image (or the pair) in the last turn too.
        rule: for promotions, see `tasks.promotion`.
        after_description: the turn before the last is a description of the whole shelf that does not contain the
            answer (of an item's answer: its price); `distance` is then at least 1.
        labels: for promotions, whose rules may be asked for, at least three of them; None for all.
    """
    if distance < 0:
        raise ValueError(f"distance must be 0 or more, not {distance}")
    task = task or rng.choice(TASKS)
    distance = max(distance, 1) if after_description else distance
    if task in ("compare", "difference"):
        scenes, target = ask_pair(task, rng, split)
    else:
        scenes = [sample_scene(rng, split)]
        target = ask(scenes[0], rng, task, rule, labels)
    shown = list(range(len(scenes)))
    turns = []
    for since in range(distance):
        if after_description and since == distance - 1:
            question = describe(scenes[0], rng, DESCRIPTION_BEFORE.get(task, "tags"))
        else:
            question = _filler(scenes[0], rng, target)
        turns.append(Turn(arrange(rng, question.text, shown if since == 0 else []), question, since))
    again = shown_again or distance == 0
    turns.append(Turn(arrange(rng, target.text, shown if again else []), target, 0 if shown_again else distance))
    return Conversation(turns, [render_array(scene) for scene in scenes], [*scenes], distance)


def _filler(scene: Scene, rng: Random, target: Question) -> Question:
    """A question that does not give the target's answer away."""
    while True:
        question = ask(scene, rng, rng.choice(FILLER_TASKS))
        same_label = question.task == "label" and target.task in ("label", "promotion")
        if not question.cells & target.cells and not same_label:
            return question
        if len(target.cells) == SIDE * SIDE and question.task == "label":
            return question
