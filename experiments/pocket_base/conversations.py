"""The conversations that the pocket base is trained on: shelves, pairs, descriptions, easy-VQA and drills."""

from __future__ import annotations

from random import Random

from pocket_base import drills
from pocket_base.handwriting import render_varied
from vismem.pocket import easyvqa
from vismem.pocket.conversations import Conversation, Turn, arrange, ask_pair
from vismem.pocket.tasks import Question, ask, compare
from vismem.pocket.world import sample_scene

TIDY = 0.3  # of the training shelves, see `sample_scene`
TRAINING_WEIGHTS = {
    "colour": 1.0,
    "shape": 1.0,
    "digit": 1.2,
    "label": 0.6,
    "item": 0.8,
    "row": 1.6,
    "column": 0.9,
    "colours": 0.6,
    "shapes": 0.6,
    "sum": 2.4,
    "basket": 0.9,
    "promotion": 5.0,
}
EARLY_WEIGHTS = {
    "row": 3.0,
    "column": 1.5,
    "colour": 1.0,
    "shape": 1.0,
    "label": 1.0,
    "item": 1.0,
    "digit": 1.0,
}


def training_rule(rng: Random) -> str:
    """How a training promotion's rule is known. Each is drawn at random, so that no mapping can be learned."""
    return rng.choices(("stated", "noted", "unstated"), (0.59, 0.35, 0.06))[0]


def sample_training_conversation(rng: Random, early: bool = False) -> Conversation:
    """One conversation of the base's training mixture; `early` leans on reading tasks."""
    kind = rng.choices(
        ("shelf", "pair", "describe", "easy_vqa", "drill"),
        (0.70, 0.06, 0.10, 0.07, 0.07) if not early else (0.62, 0.04, 0.22, 0.10, 0.02),
    )[0]
    if kind == "easy_vqa":
        return _easy_vqa(rng)
    if kind == "drill":
        questions = [drills.sample(rng) for _ in range(rng.randrange(2, 6))]
        return Conversation([Turn([question.text], question, None) for question in questions], [], [])
    if kind == "pair":
        return _pair(rng)
    return _shelf(rng, early, described=kind == "describe")


def _pair(rng: Random) -> Conversation:
    """Comparisons of two shelves, one or two in a row, now and then asked after the images have gone."""
    turns, scenes = [], []
    for number in range(rng.randrange(1, 3)):
        task = "compare" if rng.random() < 0.75 else "difference"
        if number and task == "compare" and rng.random() < 0.3:
            question = compare(scenes[-2], scenes[-1], rng)
            turns.append(Turn([question.text], question, 1))
            continue
        pair, question = ask_pair(task, rng, "train")
        scenes += pair
        turns.append(Turn(arrange(rng, question.text, [len(scenes) - 2, len(scenes) - 1]), question, 0))
    return Conversation(turns, [render_varied(scene) for scene in scenes], scenes)


def _shelf(rng: Random, early: bool, described: bool) -> Conversation:
    weights = EARLY_WEIGHTS if early else TRAINING_WEIGHTS
    tasks = rng.choices(tuple(weights), tuple(weights.values()), k=rng.randrange(2, 9))
    again = 1.0 if early else rng.choice((0.0, 0.3, 0.6, 0.9, 0.9))
    if described:
        tasks = ["describe", *tasks[: rng.randrange(0, 4)]]
    turns, scenes = [], [sample_scene(rng, tidy=TIDY)]
    if rng.random() < 0.15:
        greeting = drills.greeting(rng)
        turns.append(Turn([greeting.text], greeting, None))
    since = 0
    for number, task in enumerate(tasks):
        show = number == 0 or rng.random() < again
        if show and number and rng.random() < 0.15:  # another shelf: the latest one counts
            scenes.append(sample_scene(rng, tidy=TIDY))
        since = 0 if show else since + 1
        question = ask(scenes[-1], rng, task, training_rule(rng))
        user = arrange(rng, question.text, [len(scenes) - 1]) if show else [question.text]
        turns.append(Turn(user, question, since))
    return Conversation(turns, [render_varied(scene) for scene in scenes], scenes)


def easy_vqa_question(text: str, answer: str) -> Question:
    return Question("easy_vqa", text, f"{answer.capitalize()}.", answer)


def _easy_vqa(rng: Random) -> Conversation:
    picture, pairs = easyvqa.sample_image(rng, "train")
    turns, since, again = [], 0, rng.choice((0.2, 0.8))
    for number, (text, answer) in enumerate(rng.sample(pairs, min(len(pairs), rng.randrange(2, 7)))):
        show = number == 0 or rng.random() < again
        since = 0 if show else since + 1
        turns.append(Turn(arrange(rng, text, [0]) if show else [text], easy_vqa_question(text, answer), since))
    return Conversation(turns, [picture], [None])
