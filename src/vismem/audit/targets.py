"""Probe targets: known facts of the scene, and those that the question asks about.

Facts come from the column `attributes` (name to value) and from columns that the user names. Names with the same first
word ("colour r1c2", "colour r3c1") form a family, whose accuracies are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vismem.data import Row
from vismem.training.rollout import seed_of

ATTRIBUTES, ASKED = "attributes", "asked"
MOST_OF_FAMILY = 6  # evenly spaced members of a family; more cost time and add little


@dataclass(frozen=True)
class Target:
    """A fact to probe for: its family, and its value for every row, None where unknown."""

    name: str
    family: str
    values: list[str | None]

    def at(self, rows: Sequence[int]) -> Target:
        """The target of some of the rows."""
        return replace(self, values=[self.values[row] for row in rows])


def targets(rows: Sequence[Row], columns: Sequence[str] = (), seed: int = 0) -> list[Target]:
    """The targets of these rows.

    Args:
        rows: the questions.
        columns: columns to probe for besides `attributes`; `answer` is the row's answer. A column of mappings is a
            family for each of its names.
        seed: of the choice of facts that were not asked about.

    Raises:
        ValueError: if no row has a named column, or it holds lists.
    """
    found = _facts([row.columns.get(ATTRIBUTES) for row in rows])
    for column in columns:
        values: list[Any] = [row.answer if column == "answer" else row.columns.get(column) for row in rows]
        if all(value is None for value in values):
            known = sorted({name for row in rows for name in row.columns} | {"answer"})
            raise ValueError(f"no row has a column {column!r} to probe for; there are {', '.join(known)}")
        if any(isinstance(value, Mapping) for value in values):
            found += _facts(values, f"{column} ")
        elif any(isinstance(value, (list, tuple)) for value in values):
            raise ValueError(f"column {column!r} holds lists; a probe needs one value per row")
        else:
            found.append(Target(column, column, [None if value is None else str(value) for value in values]))
    return found + _asked(rows, seed)


def _facts(facts: Sequence[Mapping[str, Any] | None], before: str = "") -> list[Target]:
    names = dict.fromkeys(name for each in facts if each for name in each)
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.partition(" ")[0], []).append(name)
    found = []
    for family, members in families.items():
        step = max(len(members) / MOST_OF_FAMILY, 1)
        for name in [members[int(index * step)] for index in range(min(len(members), MOST_OF_FAMILY))]:
            values = [None if not each or each.get(name) is None else str(each[name]) for each in facts]
            found.append(Target(before + name, before + family, values))
    return found


def _asked(rows: Sequence[Row], seed: int) -> list[Target]:
    """For each family its value at a place that the question asks about, and at one that it does not ask about.

    Places are the second words of attributes' names. The column `asked` has cells (row and column from 0), whose place
    is named "r1c2"; "r1" counts as asked about if all cells are in that row. Memory content that follows the question
    shows up in the first target and not in the second.
    """
    values: dict[str, list[str | None]] = {}
    for number, row in enumerate(rows):
        facts, cells = row.columns.get(ATTRIBUTES), row.columns.get(ASKED)
        if not facts or not cells:
            continue
        lines = {line for line, _ in cells}
        places = [f"r{line + 1}c{column + 1}" for line, column in cells]
        places += [f"r{line + 1}" for line in lines] if len(lines) == 1 else []
        for family in dict.fromkeys(name.partition(" ")[0] for name in facts):
            known = {name.partition(" ")[2]: value for name, value in facts.items() if name.startswith(family + " ")}
            about = [place for place in places if place in known]
            others = sorted(place for place in known if place not in places)
            if not about or not others:
                continue
            other = others[seed_of(seed, "asked", row.id, family) % len(others)]
            for how, place in ((f"{family} asked about", about[0]), (f"{family} not asked about", other)):
                values.setdefault(how, [None] * len(rows))[number] = str(known[place])
    return [Target(name, name, kept) for name, kept in values.items()]
