"""Turns without an image: greetings, and drills on the sums and promotions that answers reason with."""

from __future__ import annotations

from random import Random

from vismem.pocket.tasks import Question, promotion_reply, spaced, state_rule, sum_reply
from vismem.pocket.world import LABEL_NAMES, RULES

GREETINGS = (
    ("Hello.", "Hello. What do you want to know?"),
    ("Hi!", "Hi. What do you want to know?"),
    ("Good morning.", "Good morning. How can I help?"),
    ("Can you help me?", "Yes. Please show me the shelf."),
    ("I have some questions about a shelf.", "Good. Please show me the shelf."),
    ("Thank you.", "You are welcome."),
    ("Here are a few questions. Please answer briefly.", "Yes. Please ask."),
)


def greeting(rng: Random) -> Question:
    text, reply = rng.choice(GREETINGS)
    return Question("greeting", text, reply, reply)


def sample(rng: Random) -> Question:
    """A sum of a row in words, a promotion on one, or a greeting. The replies are those to an image."""
    kind = rng.random()
    number, prices = rng.randrange(1, 5), [rng.randrange(10) for _ in range(4)]
    echo = f"Row {number}"
    if kind < 0.35:
        wording = rng.choice(("Add {}.", "What is the sum of {}?", "Sum of {}?"))
        text = wording.format(f"row {number}, {spaced(prices)}")
        return Question("drill", text, f"{echo}: {sum_reply(prices)}", str(sum(prices)), echo=echo)
    if kind < 0.95:
        return _promotion(rng, echo, prices)
    return greeting(rng)


def _promotion(rng: Random, echo: str, prices: list[int]) -> Question:
    """Its rule is stated in the question or (35 %) noted in the reply."""
    name, rule = rng.choice(LABEL_NAMES), rng.choice(RULES)
    text, note = f"{echo}, {name} label: {spaced(prices)}. What do I pay?", ""
    if rng.random() < 0.35:
        note = rule.words
    else:
        text = f"{state_rule(name, rule, rng)} {text}"
    reply = f"{echo}: {promotion_reply(name, rule, prices)}"
    return Question("drill", text, reply, str(sum(rule.apply(prices))), echo=echo, label=name, note=note)
