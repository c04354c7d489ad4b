"""What can be asked about a scene: question wordings, answers that reason step by step, and their scoring.

A reply begins with an echo of the place it is about, always in one wording, and a colon: "Row 2 column 3: red."
It ends in its result; where steps come first, the result follows the last "So". `score` compares what a completion
says there with the reference, so one function serves training rewards and evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from vismem.pocket.world import PROMOTION_RULES, RULES, SIDE, Rule, Scene

NUMBER_WORDS = ("one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Question:
    """One question about one or two scenes.

    `text` is what the user says, `reply` the reference reply with its steps, `answer` the result alone. `cells`
    names the (row, column) places that the reply needs and reveals: filler turns keep clear of them. `echo` is the
    place that the reply begins with, before its first colon. `note`: what the reply has to recall, if neither the
    picture nor the question says it (a promotion's rule); it belongs after the label, the reply's second colon.
    """

    task: str
    text: str
    reply: str
    answer: str
    cells: frozenset[tuple[int, int]] = frozenset()
    rule: str = ""
    echo: str = ""
    label: str = ""
    note: str = ""


def _reply(
    task: str, text: str, echo: str, said: str, answer: str, cells: Iterable[tuple[int, int]], **more: str
) -> Question:
    """A question whose reply is an echo of the place, a colon and `said`."""
    return Question(task, text, f"{echo}: {said}", answer, frozenset(cells), echo=echo, **more)


def _line_echo(index: int, kind: str = "Row") -> str:
    return f"{kind} {index + 1}"


def _cell_echo(row: int, column: int) -> str:
    return f"Row {row + 1} column {column + 1}"


def _line(rng: Random, kind: str, index: int) -> str:
    """A row or column in words: "row 2", "row two" or "the second row"."""
    return rng.choice(
        (
            f"{kind} {index + 1}",
            f"{kind} {index + 1}",
            f"{kind} {NUMBER_WORDS[index]}",
            f"the {ORDINALS[index]} {kind}",
        )
    )


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


def _row_cells(row: int) -> frozenset[tuple[int, int]]:
    return frozenset((row, column) for column in range(SIDE))


def spaced(prices: list[int] | tuple[int, ...]) -> str:
    return " ".join(str(price) for price in prices)


def running_sum(prices: list[int]) -> str:
    """The steps of a sum and its result: [4, 7, 0, 2] -> "11, 11, 13. So 13."."""
    totals = [sum(prices[: i + 1]) for i in range(1, len(prices))]
    return ", ".join(map(str, totals)) + f". So {totals[-1]}."


def sum_reply(prices: list[int]) -> str:
    """[4, 7, 0, 2] -> "4 7 0 2. 11, 11, 13. So 13."."""
    return f"{spaced(prices)}. {running_sum(prices)}"


Task = Callable[[Scene, Random], Question]


def _about_cell(task: str, wordings: tuple[str, ...], read: Callable[[Scene, int, int], object]) -> Task:
    """A task about a random cell; `read(scene, row, column)` gives the answer."""

    def ask(scene: Scene, rng: Random) -> Question:
        row, column = _cell(rng)
        where = _place(rng, row, column)
        text, value = rng.choice(wordings).format(where), str(read(scene, row, column))
        return _reply(task, text, _cell_echo(row, column), f"{value}.", value, {(row, column)})

    return ask


def _about_row(task: str, wordings: tuple[str, ...], read: Callable[[Scene, int], str]) -> Task:
    """A task about a random row; `read(scene, row)` gives the answer."""

    def ask(scene: Scene, rng: Random) -> Question:
        row = rng.randrange(SIDE)
        where = _line(rng, "row", row)
        text, value = rng.choice(wordings).format(where), read(scene, row)
        return _reply(task, text, _line_echo(row), f"{value}.", value, _row_cells(row))

    return ask


READ_PRICES = ("Read {}.", "Read the prices of {}.", "Which prices are in {}?", "Prices in {}?")

colour = _about_cell(
    "colour",
    (
        "What colour is the tag at {}?",
        "Colour of the tag at {}?",
        "Look at {}. Which colour is the tag?",
        "Tell me the tag colour at {}.",
    ),
    lambda scene, row, column: scene.colours[row][column],
)
shape = _about_cell(
    "shape",
    (
        "What shape is the tag at {}?",
        "Shape of the tag at {}?",
        "Which shape has the tag at {}?",
        "Tell me the tag shape at {}.",
    ),
    lambda scene, row, column: scene.shapes[row][column],
)
digit = _about_cell(
    "digit",
    (
        "What is the price at {}?",
        "Price at {}?",
        "How much is the item at {}?",
        "Please read the price at {}.",
    ),
    lambda scene, row, column: scene.prices[row][column],
)
item = _about_cell(
    "item",
    ("What is at {}?", "Describe the item at {}.", "Which item is at {}?"),
    lambda scene, row, column: f"{scene.colours[row][column]} {scene.shapes[row][column]} {scene.prices[row][column]}",
)
label = _about_row(
    "label",
    ("Which label has {}?", "What label is under {}?", "Name the label of {}."),
    lambda scene, row: scene.labels[row],
)
row = _about_row("row", READ_PRICES, lambda scene, row: spaced(scene.prices[row]))
colours = _about_row(
    "colours",
    ("Read the colours of {}.", "Which colours are in {}?", "Colours in {}?"),
    lambda scene, row: " ".join(scene.colours[row]),
)
shapes = _about_row(
    "shapes",
    ("Read the shapes of {}.", "Which shapes are in {}?", "Shapes in {}?"),
    lambda scene, row: " ".join(scene.shapes[row]),
)


def column(scene: Scene, rng: Random) -> Question:
    index = rng.randrange(SIDE)
    where = _line(rng, "column", index)
    text = rng.choice(READ_PRICES).format(where)
    value = spaced([scene.prices[r][index] for r in range(SIDE)])
    cells = {(r, index) for r in range(SIDE)}
    return _reply("column", text, _line_echo(index, "Column"), f"{value}.", value, cells)


def total(scene: Scene, rng: Random) -> Question:
    index = rng.randrange(SIDE)
    where = _line(rng, "row", index)
    text = rng.choice(
        (
            f"What is the sum of {where}?",
            f"Add the prices of {where}.",
            f"What do the items in {where} cost together?",
            f"Sum of {where}?",
        )
    )
    prices = list(scene.prices[index])
    return _reply("sum", text, _line_echo(index), sum_reply(prices), str(sum(prices)), _row_cells(index))


def basket(scene: Scene, rng: Random) -> Question:
    first, second = _cell(rng), _cell(rng)
    one, two = f"row {first[0] + 1} column {first[1] + 1}", f"row {second[0] + 1} column {second[1] + 1}"
    text = rng.choice(
        (
            f"I buy {one} and {two}. What do I pay?",
            f"What is {one} plus {two}?",
            f"Add {one} and {two}.",
        )
    )
    prices = [scene.prices[first[0]][first[1]], scene.prices[second[0]][second[1]]]
    echo, said = f"{one.capitalize()} and {two}", f"{prices[0]} and {prices[1]}. So {sum(prices)}."
    return _reply("basket", text, echo, said, str(sum(prices)), {first, second})


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


def promotion_reply(label_name: str, rule: Rule, prices: list[int]) -> str:
    """What follows the echo of the row: "striped: first free. 4 7 0 2, pay 0 7 0 2. 7, 7, 9. So 9."."""
    paid = rule.apply(prices)
    return f"{label_name}: {rule.words}. {spaced(prices)}, pay {spaced(paid)}. {running_sum(paid)}"


PROMOTION_KINDS = ("stated", "noted", "unstated", "stated-truth", "noted-truth", "hidden-truth")


def promotion(scene: Scene, rng: Random, rule: str = "stated", labels: tuple[str, ...] | None = None) -> Question:
    """The price of a row under its label's promotion.

    `rule`: "stated" draws a rule at random and says it in the question; "noted" draws one at random and leaves it to
    a note inside the reply (`Question.note`), where a long-term memory will stand; "unstated" draws one at random
    and keeps silent, so that no mapping can be learned from it. The same by `PROMOTION_RULES`, for evaluation and
    memory: "stated-truth", "noted-truth", "hidden-truth" (says nothing). `labels`: a row with one of these is asked
    about; a scene has four of six, so three labels are always enough to find one.
    """
    if rule not in PROMOTION_KINDS:
        raise ValueError(f"rule must be one of {', '.join(PROMOTION_KINDS)}, not {rule!r}")
    index = rng.choice([r for r, name in enumerate(scene.labels) if name in labels]) if labels else rng.randrange(SIDE)
    name, prices = scene.labels[index], list(scene.prices[index])
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
        said = " ".join(facts)
        text = f"{said} {text}" if rng.random() < 0.7 else f"{text} {said}"
    note = applied.words if rule.startswith("noted") else ""
    said, answer = promotion_reply(name, applied, prices), str(sum(applied.apply(prices)))
    more = {"rule": rule, "label": name, "note": note}
    return _reply("promotion", text, _line_echo(index), said, answer, _row_cells(index), **more)


def describe(scene: Scene, rng: Random, style: str | None = None) -> Question:
    """The whole shelf, row by row: its prices, its tags, or everything with labels."""
    style = style or rng.choice(("prices", "tags", "tags", "full"))
    lines = []
    for r in range(SIDE):
        if style == "prices":
            words = " " + spaced(scene.prices[r])
        elif style == "tags":
            words = " " + ", ".join(f"{scene.colours[r][c]} {scene.shapes[r][c]}" for c in range(SIDE))
        else:
            words = f" {scene.labels[r]}, " + ", ".join(
                f"{scene.colours[r][c]} {scene.shapes[r][c]} {scene.prices[r][c]}" for c in range(SIDE)
            )
        lines.append(f"Row {r + 1}:{words}.")
    text = {
        "prices": ("Read all prices.", "List all prices of the shelf.", "Which prices are on the shelf?"),
        "tags": ("Describe all tags.", "List the tags of the shelf.", "Which tags are on the shelf?"),
        "full": ("Describe the shelf.", "Describe everything on the shelf.", "Tell me all about this shelf."),
    }[style]
    reply = " ".join(lines)
    everywhere = frozenset((r, c) for r in range(SIDE) for c in range(SIDE))
    return Question(f"describe_{style}", rng.choice(text), reply, reply.rstrip("."), everywhere)


def compare(first: Scene, second: Scene, rng: Random) -> Question:
    """Two shelves, one place: on which is it dearer?"""
    r, c = _cell(rng)
    where = _place(rng, r, c)
    one, two = first.prices[r][c], second.prices[r][c]
    text = rng.choice(
        (
            f"Which shelf is dearer at {where}?",
            f"Compare {where}. Which one costs more?",
            f"Where is {where} dearer?",
        )
    )
    result = "the first" if one > two else "the second" if two > one else "same"
    return _reply("compare", text, _cell_echo(r, c), f"{one} and {two}. So {result}.", result, {(r, c)})


def difference(first: Scene, second: Scene, rng: Random) -> Question:
    """Two photographs of one shelf, one price changed in a named row: which column?

    The row is the one that differs; two equal shelves answer "none".
    """
    changed = [(r, c) for r in range(SIDE) for c in range(SIDE) if first.prices[r][c] != second.prices[r][c]]
    r, c = changed[0] if changed else (rng.randrange(SIDE), None)
    where = _line(rng, "row", r)
    text = rng.choice(
        (f"What changed in {where}?", f"Which column changed in {where}?", f"Find the change in {where}.")
    )
    result = "none" if c is None else f"column {c + 1}"
    said = f"{spaced(first.prices[r])}, then {spaced(second.prices[r])}. So {result}."
    return _reply("difference", text, _line_echo(r), said, result, _row_cells(r))


SINGLE_TASKS = {
    "colour": colour,
    "shape": shape,
    "digit": digit,
    "label": label,
    "item": item,
    "row": row,
    "column": column,
    "colours": colours,
    "shapes": shapes,
    "sum": total,
    "basket": basket,
}
PAIR_TASKS = {"compare": compare, "difference": difference}
TASKS = (*SINGLE_TASKS, "promotion", *PAIR_TASKS, "describe_prices", "describe_tags", "describe_full")


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
