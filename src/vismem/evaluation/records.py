"""Records of answers, and the files they are saved in: written as they come, and read by a resumed run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vismem import jsonl

ALWAYS = ("id", "score", "reply", "tokens", "sampled")


@dataclass(frozen=True)
class Record:
    """One answered question.

    Args:
        id: of its row.
        score: the rewards' total.
        reply: the answer's text, without special tokens.
        tokens: number of new tokens, including invocation and end tokens.
        sampled: number of sampled tokens.
        delimiters: number of places where memory could be invoked: ends of phrases, and sampled invocations.
        invocations: `kind`, `position` (index among the new tokens), `length` and `forced` of each, in order.
        finish: `"stop"`, `"length"` or `"error"`.
        columns: the row's columns that tables group by.
        error: why there is no answer; the question counts as wrong.
    """

    id: str
    score: float
    reply: str
    tokens: int
    sampled: int
    delimiters: int = 0
    invocations: list[dict[str, Any]] = field(default_factory=list)
    finish: str = "stop"
    columns: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def failed(cls, row_id: str, error: str, columns: dict[str, Any] | None = None) -> Record:
        """The record of a question that could not be asked or answered."""
        return cls(row_id, 0.0, "", 0, 0, finish="error", columns=columns or {}, error=error)


DEFAULTS = vars(Record("", 0.0, "", 0, 0))


class Merged(NamedTuple):
    """A merged file, and its lines from one result file: the settings, then the results."""

    path: Path
    lines: list[dict[str, Any]]


def merged_answers(folder: Path) -> dict[Path, Merged]:
    """Record files that were merged into one file per table, by the path that each would have on its own.

    A merged file `folder/TABLE.jsonl` has the lines of `folder/METHOD/ANSWERS.jsonl`, each with `method` and `answers`.
    `experiments/merge_answers.py` writes them.

    Raises:
        ValueError: if a line does not name its method and answers.
    """
    found: dict[Path, Merged] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in jsonl.read(path):
            try:
                place = folder / line.pop("method") / f"{line.pop('answers')}.jsonl"
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path} holds a line without method and answers; delete the file") from error
            found.setdefault(place, Merged(path, [])).lines.append(line)
    return found


class ResultFile:
    """A JSON Lines file of results by id, written as they come; its first line holds the settings.

    Reads the results of an earlier run; a truncated last line is dropped.

    Args:
        path: the file; created with its folder when the first results are added.
        settings: of the results; plain values.
        merged: the same results from `merged_answers`, read if there is no file at `path`.

    Attributes:
        rows: the results by id.

    Raises:
        ValueError: if the file holds results of other settings, or a line is not a result.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], merged: Merged | None = None) -> None:
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self._read(self.path, jsonl.read(self.path))
            self._write()
        elif merged is not None:
            self._read(*merged)

    def _read(self, source: Path, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        check_settings(source, lines[0].get("settings"), self.settings)
        try:
            self.rows = {line["id"]: line for line in lines[1:]}
        except KeyError as error:
            raise ValueError(f"{source} has a line without {error}; delete the file") from error

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends results."""
        if not self.path.is_file():
            self._write()
        jsonl.append(self.path, rows)
        self.rows.update((row["id"], row) for row in rows)

    def _write(self) -> None:
        jsonl.write(self.path, [{"settings": self.settings}, *self.rows.values()])


class RecordFile(ResultFile):
    """A `ResultFile` of records.

    Attributes:
        records: the records by id.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], merged: Merged | None = None) -> None:
        super().__init__(path, settings, merged)
        try:
            self.records = {row_id: Record(**row) for row_id, row in self.rows.items()}
        except TypeError as error:
            raise ValueError(f"{self.path} has a line that is not a record ({error}); delete the file") from error

    @property
    def done(self) -> set[str]:
        """Ids of the answered questions."""
        return set(self.records)

    def add(self, records: Iterable[Record]) -> None:
        """Appends records."""
        new = list(records)
        self.append([plain(record) for record in new])
        self.records.update((record.id, record) for record in new)

    def add_all(self, records: Iterable[Record]) -> None:
        """Adds records in one write, so that a process that dies leaves all of them or none."""
        new = list(records)
        self.rows.update((record.id, plain(record)) for record in new)
        self.records.update((record.id, record) for record in new)
        self._write()


def plain(record: Record) -> dict[str, Any]:
    """A record as a dictionary without default values."""
    return {name: value for name, value in vars(record).items() if name in ALWAYS or value != DEFAULTS[name]}


def check_settings(path: Path, earlier: Any, settings: dict[str, Any]) -> None:
    """Raises ValueError if a file's settings differ."""
    if not isinstance(earlier, dict):
        raise ValueError(f"{path} has no settings; choose another output_dir, or delete the file")
    names = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    if names:
        name = names[0]
        raise ValueError(
            f"{path} holds answers with {name}={earlier.get(name)!r}, not {settings.get(name)!r}; "
            "choose another output_dir, or delete the file to answer again"
        )
