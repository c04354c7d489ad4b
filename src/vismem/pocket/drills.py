"""Turns without an image: greetings, and the sums and promotions that the answers' steps are made of."""

from __future__ import annotations

from random import Random

from vismem.pocket.tasks import Question, promotion_reply, running_sum, spaced, state_rule
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
    """A sum of four numbers, a promotion on four prices, or a greeting."""
    kind = rng.random()
    prices = [rng.randrange(10) for _ in range(4)]
    if kind < 0.35:
        text = rng.choice(("Add {}.", "What is the sum of {}?", "Sum of {}?")).format(spaced(prices))
        return Question("drill", text, running_sum(prices), str(sum(prices)))
    if kind < 0.93:
        name, rule = rng.choice(LABEL_NAMES), rng.choice(RULES)
        text = f"{state_rule(name, rule, rng)} {name.capitalize()} row: {spaced(prices)}. What do I pay?"
        return Question("drill", text, promotion_reply(name, rule, prices), str(sum(rule.apply(prices))))
    return greeting(rng)
