"""The questions that an audit asks: drawn by chance from a data set, questions about one image together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from vismem.audit.activations import image_digest
from vismem.bundled import POCKET
from vismem.data import BadDataError, Row, Rows, load_dataset_rows
from vismem.evaluation.records import Record


def questions(
    data: str, count: int, seed: int = 0, split: str = "test", columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Rows of a data set, the same for a seed; the first n of them are those that a smaller count gives.

    Args:
        data: a JSON Lines file, a folder, a hub name, or a suite of the pocket world such as `"pocket:late"`.
        count: how many at most.
        seed: of the choice.
        split: of a hub data set.
        columns: as for `load_dataset_rows`.

    Raises:
        ValueError: if the suite is unknown or two rows share an id.
        BadDataError: if the data cannot be read.
    """
    return questions_and_unread(data, count, seed, split, columns)[0]


def questions_and_unread(
    data: str, count: int, seed: int = 0, split: str = "test", columns: Mapping[str, str] | None = None
) -> tuple[list[Row], list[Record]]:
    """Returns `questions`, and beside them a record of each row met that cannot be read, with its error."""
    source, _, suite = data.partition(":")
    if source == POCKET:
        return pocket_questions(suite, count, seed), []
    rows = load_dataset_rows(data, split=split, columns=columns, max_bad_rows=None)
    if not isinstance(rows, Rows):
        raise BadDataError(f"{data} can only be read in order, and the audit draws its questions by chance")
    found = drawn(rows, count, seed)
    return found, [Record.failed(row_id, why) for row_id, why in rows.reports.found]


def pocket_questions(suite: str, count: int, seed: int) -> list[Row]:
    """Questions of a pocket suite, its cells in turn."""
    from vismem.pocket.suites import SUITES
    from vismem.pocket.suites import rows as suite_rows

    if suite not in SUITES:
        raise ValueError(f"unknown pocket suite {suite!r}; there are {', '.join(SUITES)}")
    turn = len(SUITES[suite].cells) * SUITES[suite].share
    return suite_rows(suite, -(-count // turn), seed)[:count]


def drawn(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` rows by chance; neighbours that ask about the same image come along with a row.

    Only rows that are taken, and their neighbours, are opened.
    """
    order = list(range(len(rows)))
    Random(seed).shuffle(order)
    found: dict[int, Row] = {}
    for start in order:
        if len(found) >= count:
            break
        if start in found:
            continue
        found[start] = rows[start]
        for step in (1, -1):
            index = start + step
            while 0 <= index < len(rows) and index not in found and len(found) < count:
                row = rows[index]
                if not row.images or image_digest(row) != image_digest(found[start]):
                    break
                found[index] = row
                index += step
    by_id = {row.id: row for row in found.values()}  # a broken row is replaced by the next one, which may be there too
    return list(by_id.values())
