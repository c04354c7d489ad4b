"""What can be asked about a scene: question wordings, answers that reason step by step, and their scoring.

A reply begins with an echo of the place it is about, always in one wording, and a colon: "Row 2 column 3: red."
It ends in its result; where steps come first, the result follows the last "So". `score` compares what a completion
says there with the reference, so one function serves training rewards and evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from vismem.pocket.world import PROMOTION_RULES, RULES, SIDE, Rule, Scene

NUMBER_WORDS = ("one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
TASKS = (
    *("colour", "shape", "digit", "label", "item", "row", "column", "colours", "shapes", "sum", "basket"),
    *("promotion", "compare", "difference", "describe_prices", "describe_tags", "describe_full"),
)
PROMOTION_KINDS = ("stated", "noted", "unstated", "stated-truth", "noted-truth", "hidden-truth")


@dataclass(frozen=True)
class Question:
    """One question about one or two scenes."""

    task: str
    text: str  # what the user says
    reply: str  # the reference reply, with its steps
    answer: str  # the result alone
    cells: frozenset[tuple[int, int]] = frozenset()  # (row, column) places that the reply needs and reveals
    rule: str = ""  # how a promotion's rule is known, one of `PROMOTION_KINDS`
    echo: str = ""  # the place that the reply begins with, before its first colon
    label: str = ""  # of a promotion; the reply's second colon follows it
    note: str = (
        ""  # what the reply has to recall after the label: a rule that neither the picture nor the question says
    )


def _question(task: str, text: str, echo: str, said: str, cells: Iterable[tuple[int, int]], **more: str) -> Question:
    """A question whose reply is an echo of the place, a colon and `said`, which ends in the answer."""
    return Question(task, text, f"{echo}: {said}", final_result(said), frozenset(cells), echo=echo, **more)


def _line(rng: Random, kind: str, index: int) -> str:
    """A row or column in words: "row 2", "row two" or "the second row"."""
    name, word = f"{kind} {index + 1}", NUMBER_WORDS[index]
    return rng.choice((name, name, f"{kind} {word}", f"the {ORDINALS[index]} {kind}"))


def _place(rng: Random, row: int, column: int) -> str:
    return rng.choice(
        (
            f"row {row + 1}, column {column + 1}",
            f"row {row + 1} column {column + 1}",
            f"row {NUMBER_WORDS[row]}, column {NUMBER_WORDS[column]}",
            f"column {column + 1} of row {row + 1}",
            f"the {ORDINALS[row]} row, {ORDINALS[column]} column",
        )
    )


def _cell(rng: Random) -> tuple[int, int]:
    return rng.randrange(SIDE), rng.randrange(SIDE)


def _row_cells(row: int) -> set[tuple[int, int]]:
    return {(row, column) for column in range(SIDE)}


def spaced(words: Iterable[object]) -> str:
    return " ".join(map(str, words))


def running_sum(prices: Sequence[int]) -> str:
    """The steps of a sum and its result: [4, 7, 0, 2] -> "11, 11, 13. So 13."."""
    totals = [sum(prices[: i + 1]) for i in range(1, len(prices))]
    return ", ".join(map(str, totals)) + f". So {totals[-1]}."


def sum_reply(prices: Sequence[int]) -> str:
    """[4, 7, 0, 2] -> "4 7 0 2. 11, 11, 13. So 13."."""
    return f"{spaced(prices)}. {running_sum(prices)}"


# By task the wordings of its question, with the place to fill in, and what the reply says after the echo.
CELL_TASKS: dict[str, tuple[tuple[str, ...], Callable[[Scene, int, int], str]]] = {
    "colour": (
        (
            "What colour is the tag at {}?",
            "Colour of the tag at {}?",
            "Look at {}. Which colour is the tag?",
            "Tell me the tag colour at {}.",
        ),
        lambda scene, row, column: f"{scene.colours[row][column]}.",
    ),
    "shape": (
        (
            "What shape is the tag at {}?",
            "Shape of the tag at {}?",
            "Which shape has the tag at {}?",
            "Tell me the tag shape at {}.",
        ),
        lambda scene, row, column: f"{scene.shapes[row][column]}.",
    ),
    "digit": (
        ("What is the price at {}?", "Price at {}?", "How much is the item at {}?", "Please read the price at {}."),
        lambda scene, row, column: f"{scene.prices[row][column]}.",
    ),
    "item": (
        ("What is at {}?", "Describe the item at {}.", "Which item is at {}?"),
        lambda scene, row, column: f"{scene.tag(row, column)} {scene.prices[row][column]}.",
    ),
}
READ_PRICES = ("Read {}.", "Read the prices of {}.", "Which prices are in {}?", "Prices in {}?")
LINE_TASKS: dict[str, tuple[tuple[str, ...], Callable[[Scene, int], str]]] = {
    "label": (
        ("Which label has {}?", "What label is under {}?", "Name the label of {}."),
        lambda scene, row: f"{scene.labels[row]}.",
    ),
    "row": (READ_PRICES, lambda scene, row: f"{spaced(scene.prices[row])}."),
    "column": (READ_PRICES, lambda scene, column: f"{spaced(prices[column] for prices in scene.prices)}."),
    "colours": (
        ("Read the colours of {}.", "Which colours are in {}?", "Colours in {}?"),
        lambda scene, row: f"{spaced(scene.colours[row])}.",
    ),
    "shapes": (
        ("Read the shapes of {}.", "Which shapes are in {}?", "Shapes in {}?"),
        lambda scene, row: f"{spaced(scene.shapes[row])}.",
    ),
    "sum": (
        ("What is the sum of {}?", "Add the prices of {}.", "What do the items in {} cost together?", "Sum of {}?"),
        lambda scene, row: sum_reply(scene.prices[row]),
    ),
}


def ask(scene: Scene, rng: Random, task: str, rule: str = "stated", labels: tuple[str, ...] | None = None) -> Question:
    """A question of a single-image task."""
    if task in CELL_TASKS:
        wordings, said = CELL_TASKS[task]
        row, column = _cell(rng)
        where = _place(rng, row, column)
        text, echo = rng.choice(wordings).format(where), f"Row {row + 1} column {column + 1}"
        return _question(task, text, echo, said(scene, row, column), {(row, column)})
    if task in LINE_TASKS:
        lines, read = LINE_TASKS[task]
        kind, index = "column" if task == "column" else "row", rng.randrange(SIDE)
        where = _line(rng, kind, index)
        text, echo = rng.choice(lines).format(where), f"{kind.capitalize()} {index + 1}"
        cells = _row_cells(index) if kind == "row" else {(row, index) for row in range(SIDE)}
        return _question(task, text, echo, read(scene, index), cells)
    if task == "basket":
        return basket(scene, rng)
    if task == "promotion":
        return promotion(scene, rng, rule, labels)
    if task.startswith("describe"):
        return describe(scene, rng, task.partition("_")[2])
    raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")


def basket(scene: Scene, rng: Random) -> Question:
    first, second = _cell(rng), _cell(rng)
    one, two = (f"row {row + 1} column {column + 1}" for row, column in (first, second))
    text = rng.choice((f"I buy {one} and {two}. What do I pay?", f"What is {one} plus {two}?", f"Add {one} and {two}."))
    prices = [scene.prices[row][column] for row, column in (first, second)]
    said = f"{prices[0]} and {prices[1]}. So {sum(prices)}."
    return _question("basket", text, f"{one.capitalize()} and {two}", said, {first, second})


RULE_WORDINGS = (
    "{label} label: {rule}.",
    "The {label} label means {rule}.",
    "{label} means {rule}.",
    "Rows with the {label} label: {rule}.",
    "Promotion today, {label}: {rule}.",
)


def state_rule(label_name: str, rule: Rule, rng: Random) -> str:
    """A sentence that says in words what a label means."""
    text = rng.choice(RULE_WORDINGS).format(label=label_name, rule=rule.words)
    return text[0].upper() + text[1:]


def promotion_reply(label_name: str, rule: Rule, prices: Sequence[int]) -> str:
    """What follows the echo of the row: "striped: first free. 4 7 0 2, pay 0 7 0 2. 7, 7, 9. So 9."."""
    paid = rule.apply(prices)
    return f"{label_name}: {rule.words}. {spaced(prices)}, pay {spaced(paid)}. {running_sum(paid)}"


def promotion(scene: Scene, rng: Random, rule: str = "stated", labels: tuple[str, ...] | None = None) -> Question:
    """The price of a row under its label's promotion.

    Args:
        scene: the shelf.
        rng: all randomness comes from here.
        rule: "stated" draws a rule at random and says it in the question; "noted" draws one and leaves it to a note
            inside the reply (`Question.note`), where a long-term memory will stand; "unstated" draws one and keeps
            silent, so that no mapping can be learned from it. By `PROMOTION_RULES`, for evaluation and memory:
            "stated-truth", "noted-truth", and "hidden-truth", which says nothing.
        labels: a row with one of these is asked about; a scene has four of six, so three are always enough.
    """
    if rule not in PROMOTION_KINDS:
        raise ValueError(f"rule must be one of {', '.join(PROMOTION_KINDS)}, not {rule!r}")
    index = rng.choice([r for r, name in enumerate(scene.labels) if name in labels]) if labels else rng.randrange(SIDE)
    name = scene.labels[index]
    applied = PROMOTION_RULES[name] if rule.endswith("truth") else rng.choice(RULES)
    where = _line(rng, "row", index)
    text = rng.choice(
        (
            f"What does {where} cost with its promotion?",
            f"Price of {where} with its label?",
            f"What do I pay for {where}, {name} label?",
            f"{where[0].upper() + where[1:]} has the {name} label. What do I pay?",
        )
    )
    if rule.startswith("stated"):
        facts = [state_rule(name, applied, rng)]
        if rule == "stated" and rng.random() < 0.3:  # a second label's rule: the reply must pick its own
            other = rng.choice([other for other in scene.labels if other != name])
            facts.insert(rng.randrange(2), state_rule(other, rng.choice(RULES), rng))
        stated = " ".join(facts)
        text = f"{stated} {text}" if rng.random() < 0.7 else f"{text} {stated}"
    note = applied.words if rule.startswith("noted") else ""
    said = promotion_reply(name, applied, scene.prices[index])
    return _question("promotion", text, f"Row {index + 1}", said, _row_cells(index), rule=rule, label=name, note=note)


DESCRIPTIONS = {
    "prices": ("Read all prices.", "List all prices of the shelf.", "Which prices are on the shelf?"),
    "tags": ("Describe all tags.", "List the tags of the shelf.", "Which tags are on the shelf?"),
    "full": ("Describe the shelf.", "Describe everything on the shelf.", "Tell me all about this shelf."),
}


def describe(scene: Scene, rng: Random, style: str = "") -> Question:
    """The whole shelf, row by row: its prices, its tags, or everything with labels; by default one of these."""
    style = style or rng.choice(("prices", "tags", "tags", "full"))
    lines = []
    for row, prices in enumerate(scene.prices):
        tags = [scene.tag(row, column) for column in range(SIDE)]
        said = {
            "prices": spaced(prices),
            "tags": ", ".join(tags),
            "full": f"{scene.labels[row]}, "
            + ", ".join(f"{tag} {price}" for tag, price in zip(tags, prices, strict=True)),
        }
        lines.append(f"Row {row + 1}: {said[style]}.")
    reply = " ".join(lines)
    everywhere = frozenset((row, column) for row in range(SIDE) for column in range(SIDE))
    return Question(f"describe_{style}", rng.choice(DESCRIPTIONS[style]), reply, reply.rstrip("."), everywhere)


def compare(first: Scene, second: Scene, rng: Random) -> Question:
    """Two shelves, one place: on which is it dearer?"""
    row, column = _cell(rng)
    where = _place(rng, row, column)
    one, two = first.prices[row][column], second.prices[row][column]
    text = rng.choice(
        (f"Which shelf is dearer at {where}?", f"Compare {where}. Which one costs more?", f"Where is {where} dearer?")
    )
    result = "the first" if one > two else "the second" if two > one else "same"
    echo = f"Row {row + 1} column {column + 1}"
    return _question("compare", text, echo, f"{one} and {two}. So {result}.", {(row, column)})


def difference(first: Scene, second: Scene, rng: Random) -> Question:
    """Two photographs of one shelf, one price changed in a named row: which column?

    The row is the one that differs; two equal shelves answer "none".
    """
    changed = [(r, c) for r in range(SIDE) for c in range(SIDE) if first.prices[r][c] != second.prices[r][c]]
    row, column = changed[0] if changed else (rng.randrange(SIDE), None)
    where = _line(rng, "row", row)
    text = rng.choice(
        (f"What changed in {where}?", f"Which column changed in {where}?", f"Find the change in {where}.")
    )
    result = "none" if column is None else f"column {column + 1}"
    said = f"{spaced(first.prices[row])}, then {spaced(second.prices[row])}. So {result}."
    return _question("difference", text, f"Row {row + 1}", said, _row_cells(row))


_ECHO = re.compile(r"(row \d( column \d)?|column \d)( and row \d column \d)?[ .,:]*")


def final_result(completion: str) -> str:
    """The result that a completion states, in lower case and without a full stop.

    That is what follows its last "So"; where there is none, all but the echo it may begin with. An invocation may
    have taken the place of the echo's colon.
    """
    text = " ".join(re.sub(r"<[^>]*>", " ", completion).lower().split())
    *steps, result = re.split(r"\bso\b", text)
    result = result.strip(" .,:")
    echo = None if steps else _ECHO.match(result)
    return result[echo.end() :] or result if echo else result


def score(task: str, completion: str, answer: str) -> float:
    """How right a completion is: 1.0 or 0.0; for descriptions the share of rows that are right."""
    if not task.startswith("describe"):
        return float(final_result(completion) == final_result(answer))
    said, wanted = _rows(completion), _rows(answer)
    return sum(said.get(number) == text for number, text in wanted.items()) / max(len(wanted), 1)


def _rows(text: str) -> dict[str, str]:
    """A description's rows: {"1": "4 7 0 2", ...}; the first mention of a row counts."""
    rows: dict[str, str] = {}
    text = " ".join(re.sub(r"<[^>]*>", " ", text).lower().split())
    for number, words in re.findall(r"row (\d)[ .,:]*(.*?)(?=\.|row \d|$)", text):
        rows.setdefault(number, words.strip())
    return rows
