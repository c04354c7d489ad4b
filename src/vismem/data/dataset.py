"""Rows as torch datasets: map-style (`Rows`) and streamed (`StreamingRows`), with bad rows reported and skipped.

Both read lazily and open images when a row is asked for. Shuffling, batching and sharding over processes are the
trainer's; a DataLoader's workers are taken care of here. A row is bad if it cannot be read, if its images cannot be
opened, or if the check that `checked` adds refuses it: all three are counted and replaced alike.
"""

from __future__ import annotations

import copy
import logging
import operator
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from vismem.data.layouts import check_columns, unread_image
from vismem.data.rows import BadDataError, BadRow, Row, read_row
from vismem.data.sources import JsonLines, Stream, Table, find_source
from vismem.escaping import visible

logger = logging.getLogger(__name__)


Check = Callable[[Row], object]  # raises BadRow for a row that cannot be used
Source = JsonLines | Table | Stream


class Reports:
    """Counts bad rows, warns of each, and gives up when there are too many.

    Args:
        name: the source, for messages.
        strict: give up at the first.
        max_bad_rows: how many are skipped; None for any number.

    Attributes:
        found: ids and problems of the bad rows.
    """

    def __init__(self, name: str, strict: bool, max_bad_rows: int | None) -> None:
        self.name, self.strict, self.most = name, strict, max_bad_rows
        self.found: list[tuple[str, str]] = []

    @property
    def count(self) -> int:
        return len(self.found)

    def add(self, row_id: str, problem: str) -> None:
        """Raises BadDataError if this bad row is one too many."""
        if self.strict:
            raise BadDataError(f"{row_id}: {problem}; fix the row, or skip bad rows with strict=False")
        self.found.append((row_id, problem))
        if self.most is not None and self.count > self.most:
            raise BadDataError(
                f"{self.count} bad rows in {self.name}, more than max_bad_rows={self.most}{self._last()}"
            )
        logger.warning("skipped a bad row: %s: %s", row_id, problem)

    def nothing(self, left: str = "") -> BadDataError:
        """The error that no row is good."""
        return BadDataError(f"{self.name} has no good row{left} ({self.count} bad){self._last()}")

    def _last(self) -> str:
        """What is wrong with the last three bad rows."""
        last: dict[str, list[str]] = {}
        for row_id, problem in self.found[-3:]:
            last.setdefault(problem, []).append(row_id)
        said = "; ".join(f"{', '.join(ids)}: {problem}" for problem, ids in last.items())
        return f"; the last: {said}" if said else ""

    def copy(self) -> Reports:
        """Reports that count on from here by themselves."""
        found = copy.copy(self)
        found.found = list(self.found)
        return found


def opened(raw: Any, row_id: str, source: Source, columns: Mapping[str, str] | None, check: Check | None) -> Row:
    """The row that a source's entry holds, with its images. Raises BadRow."""
    row = raw if isinstance(raw, Row) else read_row(raw, columns).open(row_id, source.folder)
    if check is not None:
        check(row)
    return row


class Rows(Dataset[Row]):
    """Rows by index. Made by `load_dataset_rows`.

    A row that turns out to be bad when it is read is replaced by the next good one, always the same. `Rows[i]` does
    not depend on what was read before.
    """

    def __init__(
        self,
        source: JsonLines | Table,
        reports: Reports,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.reports, self.columns = source, reports, columns
        self._check: Check | None = None
        self._bad: set[int] = set()
        self._keys: Sequence[int]
        self._numbers: Sequence[int]
        if isinstance(source, Table) and source.trusted:
            length = len(source.rows)
            self._keys = self._numbers = range(length if limit is None else min(limit, length))
        else:
            self._keys, self._numbers = self._scanned(limit)
        if not self._keys:
            raise reports.nothing()

    def _scanned(self, limit: int | None) -> tuple[array[int], array[int]]:
        """Keys and numbers of the rows that can be read and whose image files are there."""
        keys, numbers, source = array("q"), array("q"), self.source

        said = False

        def look(raw: Any) -> None:
            nonlocal said
            if isinstance(raw, Row):
                return
            draft = read_row(raw, self.columns)
            draft.find(source.folder)
            if not (said or draft.sources) and (name := unread_image(draft.columns)):
                said = True
                logger.warning(
                    "%s: `%s` looks like an image but is not read; if it is one: columns={images: %s}",
                    source.name,
                    name,
                    name,
                )

        title = visible(f"reading {source.name}")
        for key, number, problem in tqdm(source.scan(look), desc=title, unit=" rows", delay=2):
            if problem is not None:
                self.reports.add(source.row_id(number), problem)
                continue
            keys.append(key)
            numbers.append(number)
            if limit is not None and len(keys) >= limit:
                break
        return keys, numbers

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Row:
        """The row at `index`, or the next good one. Raises IndexError, or BadDataError if too many are bad."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.source.name}")
        for step in range(len(self)):
            row = self._read((index + step) % len(self))
            if row is not None:
                return row
        raise self.reports.nothing(" left")

    def _read(self, place: int) -> Row | None:
        """The row at a place; None, and a report when it is first met, if it is bad."""
        if place in self._bad:
            return None
        row_id = self.source.row_id(self._numbers[place])
        try:
            raw = self.source.fetch(self._keys[place])
            return opened(raw, row_id, self.source, self.columns, self._check)
        except BadRow as error:
            self._bad.add(place)
            self.reports.add(row_id, str(error))
            return None

    def good(self) -> Iterator[Row]:
        """Every good row once, in order; bad ones are reported and left out."""
        yield from (row for place in range(len(self)) if (row := self._read(place)) is not None)

    def checked(self, check: Check) -> Rows:
        """The same rows, of which those are bad too that `check` refuses by a BadRow."""
        found = copy.copy(self)
        found._check, found._bad, found.reports = check, set(self._bad), self.reports.copy()
        return found


class StreamingRows(IterableDataset[Row]):
    """Rows in order, without an index. Made by `load_dataset_rows(..., streaming=True)`.

    Each DataLoader worker reads its own part and counts its own bad rows, starting from 0 in every epoch. A bad row
    is left out where it is met, so that a stream gives the same rows however often it is read.
    """

    def __init__(
        self,
        source: Source,
        strict: bool = False,
        max_bad_rows: int | None = 10,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.strict, self.max_bad_rows, self.limit = source, strict, max_bad_rows, limit
        self.columns = columns
        self._check: Check | None = None

    def checked(self, check: Check) -> StreamingRows:
        """The same rows, of which those are bad too that `check` refuses by a BadRow."""
        found = copy.copy(self)
        found._check = check
        return found

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        left = None if self.limit is None else len(range(worker, self.limit, workers))
        reports = Reports(self.source.name, self.strict, self.max_bad_rows)
        own = getattr(self.source, "shards_itself", False)
        given = 0
        if left == 0:
            return
        for place, (number, raw) in enumerate(self.source.stream()):
            if not own and place % workers != worker:
                continue
            row_id = self.source.row_id(number)
            if own and info:  # a shard's indices start from 0 in every worker
                row_id = f"{row_id}, worker {worker}"
            try:
                row = opened(raw, row_id, self.source, self.columns, self._check)
            except BadRow as error:
                reports.add(row_id, str(error))
                continue
            yield row
            given += 1
            if given == left:
                return
        if not given and workers == 1:
            raise reports.nothing()


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
    """Rows from a file, a folder, the hub, or memory, in any layout of `docs/data.md`.

    Args:
        source: a .jsonl, .json or .parquet file, a folder of `datasets.save_to_disk`, a hub dataset (`name` or
            `name:config`), a `datasets.Dataset` or `IterableDataset`, a list of dictionaries, or a torch dataset or
            list of `Row`s. What `load_dataset_rows` made is returned as it is.
        split: which part of a hub dataset or of a saved dictionary of datasets; files have none.
        strict: raise at the first bad row instead of skipping it.
        max_bad_rows: how many bad rows are skipped, with a warning each, before it is an error; None for any number.
        streaming: read in order, without an index; always so for an `IterableDataset`.
        limit: at most this many good rows.
        columns: names of columns that differ, from ours to the source's: `{"prompt": "q", "answer": "gt"}`.

    Raises:
        BadDataError: if the source cannot be read, has no good row, or more bad ones than allowed.
        ValueError: if `max_bad_rows` or `limit` is out of range, or `columns` is no mapping of texts.

    Example:
        >>> rows = load_dataset_rows([{"prompt": "1 + 1?", "answer": 2}])
        >>> rows[0].answer
        '2'
    """
    if max_bad_rows is not None and max_bad_rows < 0:
        raise ValueError(f"max_bad_rows must be 0 or more, or None for no limit, got {max_bad_rows}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, or None for all rows, got {limit}")
    check_columns(columns)
    if isinstance(source, (Rows, StreamingRows)):
        return source
    found = find_source(source, split, streaming, columns)
    if streaming or isinstance(found, Stream):
        return StreamingRows(found, strict, max_bad_rows, limit, columns)
    return Rows(found, Reports(found.name, strict, max_bad_rows), limit, columns)
