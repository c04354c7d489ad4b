"""Rows as torch datasets: map-style (`Rows`) and streamed (`StreamingRows`), with bad rows reported and skipped.

Both read lazily and open images when a row is accessed. The trainer shuffles, batches and shards over processes;
sharding over DataLoader workers happens here. A row is bad if it cannot be read, its images cannot be opened, or the
check added by `checked` rejects it.
"""

from __future__ import annotations

import copy
import logging
import operator
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from vismem.data.layouts import check_columns, unread_image
from vismem.data.rows import BadDataError, BadRowError, Row, check_files, open_row, read_row
from vismem.data.sources import JsonLines, Stream, Table, find_source
from vismem.escaping import visible

logger = logging.getLogger(__name__)

Check = Callable[[Row], object]  # raises BadRowError


@dataclass
class BadRowLog:
    """Counts bad rows, logs a warning for each, and raises when there are too many.

    Args:
        name: the source, for messages.
        strict: raise at the first bad row.
        max_bad_rows: how many to skip before raising; None for no limit.
        found: (id, problem) of each bad row.
    """

    name: str
    strict: bool
    max_bad_rows: int | None
    found: list[tuple[str, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.found)

    def add(self, row_id: str, problem: str) -> None:
        """Records a bad row. Raises BadDataError if there are now too many."""
        if self.strict:
            raise BadDataError(f"{row_id}: {problem}; fix the row, or skip bad rows with strict=False")
        self.found.append((row_id, problem))
        if self.max_bad_rows is not None and self.count > self.max_bad_rows:
            limit = f"max_bad_rows={self.max_bad_rows}"
            raise BadDataError(f"{self.count} bad rows in {self.name}, more than {limit}{self._last()}")
        logger.warning("skipped a bad row: %s: %s", row_id, problem)

    def no_good_row(self, left: str = "") -> BadDataError:
        """The error to raise when no row is good."""
        return BadDataError(f"{self.name} has no good row{left} ({self.count} bad){self._last()}")

    def _last(self) -> str:
        """The last three bad rows and their problems, for messages."""
        last: dict[str, list[str]] = {}
        for row_id, problem in self.found[-3:]:
            last.setdefault(problem, []).append(row_id)
        text = "; ".join(f"{', '.join(ids)}: {problem}" for problem, ids in last.items())
        return f"; the last: {text}" if text else ""

    def copy(self) -> BadRowLog:
        """A copy that counts independently from here on."""
        return replace(self, found=list(self.found))


class Rows(Dataset[Row]):
    """A map-style dataset of rows; create it with `load_dataset_rows`.

    A row that proves bad when read is replaced by the next good one. The replacement is deterministic: `rows[i]` does
    not depend on what was read before.
    """

    def __init__(
        self,
        source: JsonLines | Table,
        reports: BadRowLog,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.reports, self.columns = source, reports, columns
        self.check: Check | None = None
        self.bad: set[int] = set()
        self._keys: Sequence[int]
        self._numbers: Sequence[int]
        if isinstance(source, Table) and source.trusted:
            length = len(source.rows)
            self._keys = self._numbers = range(length if limit is None else min(limit, length))
        else:
            self._keys, self._numbers = self._scan(limit)
        if not self._keys:
            raise reports.no_good_row()

    def _scan(self, limit: int | None) -> tuple[array[int], array[int]]:
        """Keys and numbers of the rows that are readable and whose image files exist."""
        keys, numbers, source, warned = array("q"), array("q"), self.source, False
        title = visible(f"reading {source.name}")
        for key, number, raw in tqdm(source.scan(), desc=title, unit=" rows", delay=2):
            try:
                if not isinstance(raw, Row):
                    row, images = read_row(raw, self.columns)
                    check_files(images, source.folder)
                    if not (warned or images) and (name := unread_image(row.columns)):
                        warned = True
                        hint = f"if it is one: columns={{images: {name}}}"
                        logger.warning("%s: `%s` looks like an image but is not read; %s", source.name, name, hint)
            except BadRowError as error:
                self.reports.add(source.row_id(number), str(error))
                continue
            keys.append(key)
            numbers.append(number)
            if limit is not None and len(keys) >= limit:
                break
        return keys, numbers

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Row:
        """The row at `index`, or the next good one. Raises IndexError, or BadDataError if too many rows are bad."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.source.name}")
        for step in range(len(self)):
            row = self._read((index + step) % len(self))
            if row is not None:
                return row
        raise self.reports.no_good_row(" left")

    def _read(self, index: int) -> Row | None:
        """The row at `index`, or None if it is bad; a bad row is reported the first time."""
        if index in self.bad:
            return None
        row_id = self.source.row_id(self._numbers[index])
        try:
            return checked_row(self, self.source.fetch(self._keys[index]), row_id)
        except BadRowError as error:
            self.bad.add(index)
            self.reports.add(row_id, str(error))
            return None

    def good(self) -> Iterator[Row]:
        """Yields every good row once, in order; bad rows are reported and skipped."""
        yield from (row for index in range(len(self)) if (row := self._read(index)) is not None)

    def checked(self, check: Check) -> Rows:
        """The same rows with one more check: a row is also bad if `check` raises BadRowError."""
        rows = copy.copy(self)
        rows.check, rows.bad, rows.reports = check, set(self.bad), self.reports.copy()
        return rows


class StreamingRows(IterableDataset[Row]):
    """An iterable dataset of rows; create it with `load_dataset_rows(..., streaming=True)`.

    Each DataLoader worker reads its own share and counts its own bad rows, from 0 in every epoch. Bad rows are
    skipped, so every pass over a stream yields the same rows.
    """

    def __init__(
        self,
        source: JsonLines | Stream,
        reports: BadRowLog,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.reports, self.limit, self.columns = source, reports, limit, columns
        self.check: Check | None = None

    def checked(self, check: Check) -> StreamingRows:
        """The same rows with one more check: a row is also bad if `check` raises BadRowError."""
        rows = copy.copy(self)
        rows.check = check
        return rows

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        left = None if self.limit is None else len(range(worker, self.limit, workers))
        if left == 0:
            return
        reports = self.reports.copy()
        shards_itself = isinstance(self.source, Stream) and self.source.shards_itself
        given = 0
        for index, (_, number, raw) in enumerate(self.source.scan()):
            if not shards_itself and index % workers != worker:
                continue
            row_id = self.source.row_id(number)
            if shards_itself and info:  # a shard's indices start from 0 in every worker
                row_id = f"{row_id}, worker {worker}"
            try:
                row = checked_row(self, raw, row_id)
            except BadRowError as error:
                reports.add(row_id, str(error))
                continue
            yield row
            given += 1
            if given == left:
                return
        if not given and workers == 1:
            raise reports.no_good_row()


def checked_row(rows: Rows | StreamingRows, raw: Any, row_id: str) -> Row:
    """Reads an entry of the rows' source and opens its images. Raises BadRowError."""
    row = raw if isinstance(raw, Row) else open_row(raw, row_id, rows.source.folder, rows.columns)
    if rows.check is not None:
        rows.check(row)
    return row


def check_limits(max_bad_rows: int | None, limit: int | None) -> None:
    """Raises ValueError if either number is out of range."""
    if max_bad_rows is not None and max_bad_rows < 0:
        raise ValueError(f"max_bad_rows must be 0 or more, or None for no limit, got {max_bad_rows}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, or None for all rows, got {limit}")


def load_dataset_rows(
    source: Any,
    split: str = "train",
    *,
    strict: bool = False,
    max_bad_rows: int | None = 10,
    streaming: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Rows | StreamingRows:
    """Loads rows from a file, a folder, the hub, or memory, in any layout of `docs/data.md`.

    Args:
        source: a .jsonl, .json or .parquet file, a folder written by `save_to_disk`, a hub dataset (`name` or
            `name:config`), a `datasets.Dataset` or `IterableDataset`, a list of dictionaries, or a torch dataset or
            list of `Row`s. `Rows` and `StreamingRows` are returned unchanged.
        split: the split of a hub dataset or a saved `DatasetDict`; files have none.
        strict: raise at the first bad row instead of skipping it.
        max_bad_rows: how many bad rows to skip, with a warning each, before raising; None for no limit.
        streaming: read in order, without an index; always true for an `IterableDataset`.
        limit: maximum number of good rows.
        columns: maps our column names to the source's where they differ: `{"prompt": "q", "answer": "gt"}`.

    Raises:
        BadDataError: if the source cannot be read, has no good row, or more than `max_bad_rows` bad ones.
        ValueError: if `max_bad_rows` or `limit` is out of range, or `columns` does not map strings to strings.

    Example:
        >>> rows = load_dataset_rows([{"prompt": "1 + 1?", "answer": 2}])
        >>> rows[0].answer
        '2'
    """
    check_limits(max_bad_rows, limit)
    check_columns(columns)
    if isinstance(source, (Rows, StreamingRows)):
        return source
    found = find_source(source, split, streaming=streaming, columns=columns)
    reports = BadRowLog(found.name, strict, max_bad_rows)
    if isinstance(found, Stream) or (streaming and isinstance(found, JsonLines)):
        return StreamingRows(found, reports, limit, columns)
    return Rows(found, reports, limit, columns)
