"""What probes are to read: known facts of the scene, by name, and which of them the question asked about.

Facts come from the column `attributes` (name to value) and from columns that the user names. Names with a common first
word ("colour r1c2", "colour r3c1") are a family, whose accuracies are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vismem.data import Row
from vismem.training.rollout import seed_of

ATTRIBUTES, ASKED = "attributes", "asked"
MOST_OF_FAMILY = 6  # evenly spaced ones of a family: more cost time and tell little


@dataclass(frozen=True)
class Target:
    """One thing to read: its value for every row, None where it is not known, and its family."""

    name: str
    family: str
    values: list[str | None]


def targets(rows: Sequence[Row], columns: Sequence[str] = (), seed: int = 0) -> list[Target]:
    """What can be read of these rows.

    Args:
        rows: the questions.
        columns: columns to read besides `attributes`; `answer` is the row's answer. A column that holds names and
            values is a family of its own.
        seed: of the choice of what was not asked about.

    Raises:
        ValueError: if a named column is in no row, or holds lists.
    """
    found = list(_facts(rows, [row.columns.get(ATTRIBUTES) for row in rows]))
    for column in columns:
        values = [row.answer if column == "answer" else row.columns.get(column) for row in rows]
        if all(value is None for value in values):
            known = sorted({name for row in rows for name in row.columns} | {"answer"})
            raise ValueError(f"no row has a column {column!r} to probe for; there are {', '.join(known)}")
        if any(isinstance(value, Mapping) for value in values):
            found += _facts(rows, values, f"{column} ")
        elif any(isinstance(value, (list, tuple)) for value in values):
            raise ValueError(f"column {column!r} holds lists; a probe reads one value of a row")
        else:
            found.append(Target(column, column, [None if value is None else str(value) for value in values]))
    return found + _asked(rows, seed)


def _facts(rows: Sequence[Row], facts: Sequence[Mapping[str, Any] | None], before: str = "") -> list[Target]:
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
    """For each family its value at the place that the question is about, and at one that it is not about.

    Places are the second words of attributes' names. The column `asked` holds cells (row and column from 0) whose
    place is named "r1c2"; "r1" is asked about where all cells are of that row. Content that follows the question shows
    in the first and not in the second.
    """
    values: dict[str, dict[str, list[str | None]]] = {}
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
                values.setdefault(how, {}).setdefault("", [None] * len(rows))[number] = str(known[place])
    return [Target(name, name, kept[""]) for name, kept in values.items()]
