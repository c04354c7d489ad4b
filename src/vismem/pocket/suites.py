"""Evaluation suites of the pocket world: conversations of the test split as rows.

Late questions (the image has left the window), late questions about distorted pictures, questions in view, pairs of
pictures, totals whose label's rule is withheld, in view and late, where both memories are needed, long descriptions,
and real questions from easy-VQA. A suite's bound asks the same with what memory would have to supply: the image shown
again, the rule stated, or both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

from vismem.config import Kind
from vismem.data import Row
from vismem.pocket import easyvqa
from vismem.pocket.conversations import Conversation, sample_conversation
from vismem.pocket.practice import ASKED, DISTURBANCES, LABEL_SETS, disturbed
from vismem.pocket.world import SIDE, Scene

LATE_TASKS = ("colour", "digit", "row", "sum")
DISTANCES = (2, 4, 6, 8)
LOOK: tuple[int, Kind] = (1, "short")  # after the reply's first colon
RECALL: tuple[int, Kind] = (2, "long")  # after its second


@dataclass(frozen=True)
class Suite:
    """Questions by cell."""

    ability: str  # in the paper's grouping: understanding, reasoning or generation
    cells: dict[str, dict[str, Any]]  # from a cell's name to the options of `sample_conversation`, and `disturb`
    bound: dict[str, Any] = field(default_factory=dict)  # options that supply what memory would have to
    share: int = 1  # questions per cell, relative to `n`
    places: tuple[tuple[int, Kind], ...] = (LOOK,)  # where a reply needs memory: after which colon, of which kind


def _rules(labels: tuple[str, ...] | None = None) -> dict[str, Any]:
    return {"task": "promotion", "rule": "hidden-truth", **({"labels": labels} if labels else {})}


AGAIN, STATED = {"shown_again": True}, {"rule": "stated-truth"}
SUITES = {
    "late": Suite(
        "understanding",
        {f"{t}/{d}": {"task": t, "distance": d} for t in LATE_TASKS for d in DISTANCES}
        | {f"{t}/after_description": {"task": t, "after_description": True} for t in LATE_TASKS},
        AGAIN,
    ),
    "strange": Suite(
        "understanding",
        {f"{k}/{t}": {"task": t, "distance": 4, "disturb": k} for k in DISTURBANCES for t in LATE_TASKS},
        AGAIN,
        share=2,
    ),
    "in_view": Suite("understanding", {t: {"task": t} for t in ASKED}, share=2),
    "easy_vqa": Suite("understanding", {"easy_vqa": {}}, share=12),
    # A recalled rule pushes the picture out of the window, so a short-term memory goes with it.
    "rules": Suite("reasoning", {"promotion": _rules()}, STATED, share=12, places=(LOOK, RECALL)),
    "both": Suite(
        "reasoning",
        {f"promotion/{d}": {**_rules(), "distance": d} for d in (2, 4, 6)},
        {**AGAIN, **STATED},
        share=4,
        places=(LOOK, RECALL),
    ),
    "pairs": Suite("reasoning", {"compare": {"task": "compare"}}, share=12),
    "describe": Suite(
        "generation", {style: {"task": f"describe_{style}"} for style in ("prices", "tags", "full")}, share=4
    ),
}
# Half of the labels each: trained and untrained, or learned first and later.
SUITES |= {
    f"rules_{name}": Suite("reasoning", {f"promotion/{name}": _rules(labels)}, STATED, share=12, places=(LOOK, RECALL))
    for name, labels in LABEL_SETS.items()
}


def rows(suite: str, n: int = 12, seed: int = 1, *, bound: bool = False, split: str = "test") -> list[Row]:
    """The questions of a suite, always the same for a seed.

    Args:
        suite: one of `SUITES`.
        n: questions per cell of suites with share 1; a suite has n * share * cells of them.
        seed: of the questions.
        bound: put into the prompt what memory would have to supply. Questions and answers stay the same.
        split: whose handwriting, `"test"` or `"train"`.

    Returns:
        Rows with the columns `suite`, `cell`, `ability`, `task`, `distance`, `places` (as in `Suite`) and
        `attributes`: what is on the last picture, by name, such as `{"digit r1c2": "7"}`.

    Raises:
        ValueError: if the suite is unknown, `n` is below 1, or the suite has no bound.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown pocket suite {suite!r}; there are {', '.join(SUITES)}")
    if n < 1:
        raise ValueError(f"n must be 1 or more, not {n}")
    chosen = SUITES[suite]
    if bound and not chosen.bound:
        raise ValueError(f"the suite {suite} has no bound: nothing is missing from its questions")
    count, common = n * chosen.share, {"suite": suite, "ability": chosen.ability}
    if suite == "easy_vqa":
        return list(_easy_vqa({**common, "cell": suite}, count, seed, split))
    found = []
    for index in range(count):  # cells in turn, so that the first questions are of all kinds
        for cell, options in chosen.cells.items():
            asked = {**options, **(chosen.bound if bound else {})}
            conversation = question(f"{suite}-{cell}", index, seed, split, **asked)
            columns = {**common, "cell": cell, "places": chosen.places}
            found.append(_row(conversation, f"pocket:{suite}/{cell}[{index}]", columns))
    return found


def question(cell: str, index: int, seed: int, split: str = "test", disturb: str = "", **options: Any) -> Conversation:
    """Conversation number `index` of one cell."""
    found = sample_conversation(Random(f"{seed}-{cell}-{index}"), split, **options)
    return disturbed(found, disturb, Random(f"{seed}-{cell}-{index}-{disturb}")) if disturb else found


def attributes(scene: Scene) -> dict[str, str]:
    """What is on a shelf: digit, colour and shape of every cell, and the label of every row; rows count from 1."""
    grids = {"digit": scene.prices, "colour": scene.colours, "shape": scene.shapes}
    cells = [(r, c) for r in range(SIDE) for c in range(SIDE)]
    found = {f"{name} r{r + 1}c{c + 1}": str(grid[r][c]) for name, grid in grids.items() for r, c in cells}
    return found | {f"label r{r + 1}": label for r, label in enumerate(scene.labels)}


def _row(conversation: Conversation, row_id: str, columns: dict[str, Any]) -> Row:
    known = {"attributes": attributes(conversation.scene)} if conversation.scene else {}
    asked = sorted(conversation.turns[-1].question.cells)
    columns |= {"task": conversation.task, "distance": conversation.distance, "asked": asked, **known}
    reply, answer = conversation.answer_text, conversation.answer
    return Row(row_id, conversation.prompt, conversation.images, answer, reply, columns)


def _easy_vqa(common: dict[str, Any], count: int, seed: int, split: str) -> Iterator[Row]:
    """Real questions, each about one picture in view."""
    for index in range(count):
        rng = Random(f"{seed}-easy_vqa-{index}")
        picture, pairs = easyvqa.sample_image(rng, split)
        text, answer = rng.choice(pairs)
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        columns = {**common, "task": "easy_vqa", "distance": 0, "places": ()}
        yield Row(f"pocket:easy_vqa[{index}]", prompt, [Image.fromarray(picture)], answer, answer, columns)
