"""The audit's questions: a random sample of a data set that keeps questions about one image together."""

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
    """A sample of rows, fixed by the seed; a smaller `count` gives the first rows of a larger one.

    Args:
        data: a JSON Lines file, a folder, a hub name, or a suite of the pocket world such as `"pocket:late"`.
        count: maximum number of rows.
        seed: of the sample.
        split: of a hub data set.
        columns: see `load_dataset_rows`.

    Raises:
        ValueError: if the suite is unknown or two rows share an id.
        BadDataError: if the data cannot be read.
    """
    return questions_and_unread(data, count, seed, split, columns)[0]


def questions_and_unread(
    data: str, count: int, seed: int = 0, split: str = "test", columns: Mapping[str, str] | None = None
) -> tuple[list[Row], list[Record]]:
    """As `questions`, and also a record with the error of each row that could not be read."""
    source, _, suite = data.partition(":")
    if source == POCKET:
        from vismem.pocket.suites import SUITES
        from vismem.pocket.suites import rows as suite_rows

        if suite not in SUITES:
            raise ValueError(f"unknown pocket suite {suite!r}; there are {', '.join(SUITES)}")
        turn = len(SUITES[suite].cells) * SUITES[suite].share  # the rows alternate between cells
        return suite_rows(suite, -(-count // turn), seed)[:count], []
    rows = load_dataset_rows(data, split=split, columns=columns, max_bad_rows=None)
    if not isinstance(rows, Rows):
        raise BadDataError(f"{data} can only be read in order, but the audit samples its questions at random")
    found = sample_rows(rows, count, seed)
    return found, [Record.failed(row_id, reason) for row_id, reason in rows.reports.found]


def sample_rows(rows: Sequence[Row] | Rows, count: int, seed: int) -> list[Row]:
    """A random sample of at most `count` rows, each with its neighbours about the same image.

    Opens only the sampled rows and their neighbours.
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
    by_id = {row.id: row for row in found.values()}  # an unreadable row yields the next one, which may be there already
    return list(by_id.values())
