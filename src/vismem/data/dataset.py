"""Rows as torch datasets: map-style (`Rows`) and streamed (`StreamingRows`), with bad rows reported and skipped.

Both read lazily and open images when a row is asked for. Shuffling, batching and sharding over processes are the
trainer's; a DataLoader's workers are taken care of here.
"""

from __future__ import annotations

import logging
import operator
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from vismem.data.rows import BadDataError, BadRow, Row, read_row
from vismem.data.sources import JsonLines, Stream, Table, find_source

logger = logging.getLogger(__name__)


class Reports:
    """Counts bad rows, warns of each, and gives up when there are too many.

    Args:
        name: the source, for messages.
        strict: give up at the first.
        max_bad_rows: how many are skipped; None for any number.
    """

    def __init__(self, name: str, strict: bool, max_bad_rows: int | None) -> None:
        self.name, self.strict, self.most = name, strict, max_bad_rows
        self.count = 0
        self._last: deque[str] = deque(maxlen=3)

    def add(self, row_id: str, problem: str) -> None:
        """Raises BadDataError if this bad row is one too many."""
        message = f"{row_id}: {problem}"
        if self.strict:
            raise BadDataError(f"{message}; mend the row, or skip bad rows with strict=False")
        self.count += 1
        self._last.append(message)
        if self.most is not None and self.count > self.most:
            raise BadDataError(
                f"{self.count} bad rows in {self.name}, more than max_bad_rows={self.most}; the last: "
                + "; ".join(self._last)
            )
        logger.warning("skipped a bad row: %s", message)


class Rows(Dataset[Row]):
    """Rows by index. Made by `load_dataset_rows`.

    A row whose image turns out to be broken is replaced by the next good one, always the same. `Rows[i]` does not
    depend on what was read before.
    """

    def __init__(self, source: JsonLines | Table, reports: Reports, limit: int | None = None) -> None:
        self.source, self.reports = source, reports
        self._keys, self._numbers = array("q"), array("q")
        self._broken: set[int] = set()
        for key, number, problem in tqdm(source.scan(), desc=f"reading {source.name}", unit=" rows", delay=2):
            if problem is not None:
                reports.add(source.row_id(number), problem)
                continue
            self._keys.append(key)
            self._numbers.append(number)
            if limit is not None and len(self._keys) >= limit:
                break
        if not self._keys:
            raise BadDataError(f"{source.name} has no good row ({reports.count} bad)")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Row:
        """The row at `index`, or the next good one. Raises IndexError, or BadDataError if too many are bad."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.source.name}")
        for step in range(len(self)):
            place = (index + step) % len(self)
            if place in self._broken:
                continue
            row_id = self.source.row_id(self._numbers[place])
            try:
                return read_row(self.source.fetch(self._keys[place])).open(row_id, self.source.folder)
            except BadRow as error:
                self.reports.add(row_id, str(error))
                self._broken.add(place)
        raise BadDataError(f"{self.source.name} has no good row left ({self.reports.count} bad)")


class StreamingRows(IterableDataset[Row]):
    """Rows in order, without an index. Made by `load_dataset_rows(..., streaming=True)`.

    Each DataLoader worker reads its own part, and counts its own bad rows, anew in every epoch.
    """

    def __init__(
        self,
        source: JsonLines | Table | Stream,
        strict: bool = False,
        max_bad_rows: int | None = 10,
        limit: int | None = None,
    ) -> None:
        self.source, self.strict, self.max_bad_rows, self.limit = source, strict, max_bad_rows, limit

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
                if isinstance(raw, BadRow):
                    raise raw
                row = read_row(raw).open(row_id, self.source.folder)
            except BadRow as error:
                reports.add(row_id, str(error))
                continue
            yield row
            given += 1
            if given == left:
                return
        if not given and workers == 1:
            raise BadDataError(f"{self.source.name} has no good row ({reports.count} bad)")


def load_dataset_rows(
    source: Any,
    split: str = "train",
    *,
    strict: bool = False,
    max_bad_rows: int | None = 10,
    streaming: bool = False,
    limit: int | None = None,
) -> Rows | StreamingRows:
    """Rows in TRL's layout from a file, a folder, the hub, or memory.

    Args:
        source: a .jsonl, .json or .parquet file, a folder of `datasets.save_to_disk`, a hub dataset (`name` or
            `name:config`), a `datasets.Dataset` or `IterableDataset`, or a list of dictionaries.
        split: which part of a hub dataset or of a saved dictionary of datasets; files have none.
        strict: raise at the first bad row instead of skipping it.
        max_bad_rows: how many bad rows are skipped, with a warning each, before it is an error; None for any number.
        streaming: read in order, without an index; always so for an `IterableDataset`.
        limit: at most this many good rows.

    Raises:
        BadDataError: if the source cannot be read, has no good row, or more bad ones than allowed.
        ValueError: if `max_bad_rows` or `limit` is out of range.

    Example:
        >>> rows = load_dataset_rows([{"prompt": "1 + 1?", "answer": 2}])
        >>> rows[0].answer
        '2'
    """
    if max_bad_rows is not None and max_bad_rows < 0:
        raise ValueError(f"max_bad_rows must be 0 or more, or None for no limit, got {max_bad_rows}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, or None for all rows, got {limit}")
    found = find_source(source, split, streaming)
    if streaming or isinstance(found, Stream):
        return StreamingRows(found, strict, max_bad_rows, limit)
    return Rows(found, Reports(found.name, strict, max_bad_rows), limit)
